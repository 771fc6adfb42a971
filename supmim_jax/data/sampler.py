"""The order of training and evaluation, as worker processes compute it.

The training sequence is one infinite list: epoch after epoch, each a permutation of all ids. A
position in it is one number, and nothing in it depends on hosts, devices or workers. The classes
below are Grain transforms: they are called with an element, and are pickled to workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from grain.experimental import index_shuffle

from supmim_jax.data.decode import BrokenRecord
from supmim_jax.errors import SetupError

NONE = -1  # no id
MOST_BROKEN = 16  # records in a row; more is no accident
SHUFFLE_ROUNDS = 4  # of the block cipher in index_shuffle, as in Grain's own shuffle


@dataclass(frozen=True)
class LocalPosition:
    """Maps an index into this process's examples to a position of the global sequence."""

    rows: Sequence[int]  # of the global batch that this process feeds
    batch_size: int  # global
    first_step: int = 0

    def __call__(self, index: int) -> int:
        step, row = divmod(index, len(self.rows))
        return (self.first_step + step) * self.batch_size + self.rows[row]


@dataclass(frozen=True)
class TrainingOrder:
    """Maps a position of the training sequence to (number, id), in O(1) time and memory.

    The number is the epoch; with repeats r, of which an image has r in a row, r * epoch + 0, 1, ...
    """

    examples: int
    seed: int
    repeats: int = 1

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.examples)
        place, repeat = divmod(place, self.repeats)
        key = int(np.random.SeedSequence([self.seed, epoch]).generate_state(1)[0])
        last = self.examples - 1  # index_shuffle knows no permutation of one
        example = index_shuffle(place, last, key, SHUFFLE_ROUNDS) if last else 0
        return epoch * self.repeats + repeat, example


@dataclass(frozen=True)
class Intact:
    """Makes an example of the record with an id, or of the next one that is not broken.

    `make` is given (epoch or view, id, record); what it makes gets "broken", int32: the id that
    was wanted, where another record stands in for it, else NONE. Raises SetupError if MOST_BROKEN
    records in a row are broken.
    """

    source: Sequence[dict]
    make: Callable[[tuple[int, int, dict]], dict]

    def __call__(self, drawn: tuple[int, int]) -> dict:
        number, wanted = drawn
        reasons = []
        for offset in range(min(MOST_BROKEN, len(self.source))):
            example = (wanted + offset) % len(self.source)
            try:
                fields = self.make((number, example, self.source[example]))
            except BrokenRecord as error:
                reasons.append(str(error))
            else:
                return fields | {"broken": np.int32(wanted if offset else NONE)}
        raise SetupError(
            f"{len(reasons)} records in a row are broken: {reasons[0]} ... {reasons[-1]}. Remove "
            f"the data set's directory and prepare it again."
        )


@dataclass(frozen=True)
class EvaluationRecord:
    """Maps a position of an evaluation pass to (id, record).

    Past the end that is (NONE, None), and (id, None) for a record that cannot be read.
    """

    source: Sequence[dict]

    def __call__(self, position: int) -> tuple[int, dict | None]:
        if position >= len(self.source):
            return NONE, None
        try:
            return position, self.source[position]
        except BrokenRecord:
            return position, None
