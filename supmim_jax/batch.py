"""What flows between the parts.

Letters in names give shapes: B examples, H W image or token rows and columns, C channels,
L tokens of a whole image, K kept tokens, N tokens of a packed sequence, D width, V codes.
"""

from typing import Any, NamedTuple, Protocol

import jax
from flax import struct

Metrics = dict[str, jax.Array]


@struct.dataclass
class Batch:
    """Examples of one step, the same global values on every topology.

    `weight` is 0 for the padding of evaluation batches. `id` is the record's index: an
    example's crop, colours and mask come from it; mixing and DropPath from its row in the batch.
    """

    # Uint8 BxHxWxC each: a crop of each image or, where the step compares them, two
    # (Objective.crops), with geometry and colours of their own.
    views: tuple[jax.Array, ...]
    label: jax.Array  # int32 B
    weight: jax.Array  # float32 B
    id: jax.Array  # int32 B
    # Where the step makes targets of its own and `views` have colour augmentation: the same
    # crops without it, uint8 BxHxWxC.
    target: jax.Array | None = None
    tokens: jax.Array | None = None  # uint16 BxL, ids from a token cache
    masks: jax.Array | None = None  # int32 BxHxW, a class per pixel, or IGNORED
    micro: jax.Array | None = None  # int32 scalar: its number, if a step has several micro-batches

    def row_key(self, key: jax.Array) -> jax.Array:
        """For what is drawn by row: `key`, made the micro-batch's own where there are several."""
        return key if self.micro is None else jax.random.fold_in(key, self.micro)


@struct.dataclass
class TrainState:
    """Everything that a step changes: plain nested dicts, no RNG state."""

    step: jax.Array  # int32 scalar: steps done
    params: Any
    moving: Any  # what the loss itself overwrites (models.Moving); {} for most objectives
    opt_state: Any
    ema: Any = struct.field(default_factory=dict)  # moving average of params; {} without one

    @property
    def judged(self) -> Any:
        """The parameters that evaluations take: the moving average, where there is one."""
        return self.ema or self.params


class Features(NamedTuple):
    """What evaluators see of an encoder, and of the heads that were trained with it."""

    pooled: jax.Array  # float32 BxD
    tokens: jax.Array  # float32 BxHxWxD
    logits: jax.Array | None = None  # float32 BxV of a classifier of V classes
    masks: jax.Array | None = None  # int32 BxHxW of a segmenter: the class of each pixel


class Encoder(Protocol):
    def features(self, images: jax.Array) -> Features:
        """Features of uint8 BxHxWxC images."""


class Tokenizer(Protocol):
    num_codes: int

    def encode(self, images: jax.Array) -> jax.Array:
        """int32 ids BxL of uint8 BxHxWxC images."""

    def decode(self, ids: jax.Array) -> jax.Array:
        """Float images BxHxWxC in [-1, 1] of ids BxL."""
