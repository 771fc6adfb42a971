"""The records of a tfds data set in training or evaluation order, as worker processes read them.

The training sequence is one infinite list, epoch after epoch, each a permutation of all ids. A
position in it is one number, and nothing in it depends on hosts, devices or workers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError
from grain.experimental import index_shuffle

from supmim_jax.config import ConfigError, DataConfig, SetupError
from supmim_jax.data import fractals
from supmim_jax.data.decode import BrokenRecord

NONE = -1  # no id
MOST_BROKEN = 16  # records in a row; more is no accident
# What ArrayRecord raises for a wrong checksum, and a parser for a record of another form.
UNREADABLE = (RuntimeError, ValueError, KeyError, DecodeError)
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
    """Maps a position of the training sequence to (epoch, id)."""

    examples: int
    seed: int

    def __call__(self, position: int) -> tuple[int, int]:
        epoch, place = divmod(position, self.examples)
        return epoch, shuffled(place, self.examples, self.seed, epoch)


@dataclass(frozen=True)
class ViewOrder:
    """Maps the index of a token cache's record to (view, id)."""

    examples: int

    def __call__(self, index: int) -> tuple[int, int]:
        return divmod(index, self.examples)


@dataclass(frozen=True)
class Intact:
    """Makes an example of the record with an id, or of the next one that is not broken.

    `make` is given (epoch or view, id, record); what it makes gets "broken", int32: the id that
    was wanted, where another record stands in for it, else NONE.

    Raises:
      SetupError: MOST_BROKEN records in a row are broken.
    """

    source: Sequence[dict]
    make: Callable[[tuple[int, int, dict]], dict]

    def __call__(self, drawn: tuple[int, int]) -> dict:
        number, wanted = drawn
        reasons = []
        for offset in range(min(MOST_BROKEN, len(self.source))):
            example = (wanted + offset) % len(self.source)
            try:
                found = self.make((number, example, self.source[example]))
            except BrokenRecord as error:
                reasons.append(str(error))
            else:
                return found | {"broken": np.int32(wanted if offset else NONE)}
        raise SetupError(
            f"{len(reasons)} records in a row are broken, the first and the last: {reasons[0]}; "
            f"{reasons[-1]}. Prepare the data set again."
        )


@dataclass(frozen=True)
class EvaluationRecord:
    """Maps a position of an evaluation pass to (id, record); past the end the id is -1."""

    source: Any

    def __call__(self, position: int) -> tuple[int, dict]:
        inside = position < len(self.source)
        return (position, self.source[position]) if inside else (-1, self.source[0])


@dataclass(frozen=True)
class Records(Sequence):
    """Random access to {"image": encoded bytes, ...}; features that `fields` lacks stay unread.

    Reading raises BrokenRecord where the file's checksums or the record's form are wrong.
    """

    raw: Sequence[bytes]
    features: tfds.features.FeaturesDict
    fields: dict[str, str]  # from our names ("label", "mask") to those of the data set

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict:
        encoded = [name for ours, name in self.fields.items() if ours in ("image", "mask")]
        try:
            found = self.features.deserialize_example_np(
                self.raw[index], decoders=dict.fromkeys(encoded, tfds.decode.SkipDecoding())
            )
        except UNREADABLE as error:
            raise BrokenRecord(f"Record {index} cannot be read: {error}") from None
        return {ours: found[name] for ours, name in self.fields.items()}


def shuffled(place: int, examples: int, seed: int, epoch: int) -> int:
    """The id at `place` of the epoch's permutation of range(examples); O(1) time and memory."""
    if examples == 1:
        return 0
    key = int(np.random.SeedSequence([seed, epoch]).generate_state(1)[0])
    return index_shuffle(place, examples - 1, key, SHUFFLE_ROUNDS)


def open_source(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "label".

    `fractals` is built on first use; everything else must have been prepared.

    Raises:
      SetupError: the data set, its split or a field is missing, or is not what the config says.
    """
    builder = _builder(cfg)
    classes = getattr(_feature(builder, cfg, cfg.label_field, "label_field"), "num_classes", None)
    if classes != cfg.num_classes:
        raise SetupError(
            f"config.data.num_classes is {cfg.num_classes}, but the data set {cfg.name!r} has "
            f"{classes or 'no'} classes in its feature {cfg.label_field!r}."
        )
    return _open(builder, cfg, split, {"image": "image", "label": cfg.label_field})


def open_masks(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "mask"; the data set need not have labels.

    Raises:
      SetupError: the data set, its split or the masks are missing.
    """
    builder = _builder(cfg)
    if not isinstance(_feature(builder, cfg, cfg.masks.field, "masks.field"), tfds.features.Image):
        raise SetupError(
            f"config.data.masks.field is {cfg.masks.field!r}, which is no image in {cfg.name!r}."
        )
    return _open(builder, cfg, split, {"image": "image", "mask": cfg.masks.field})


def _feature(builder: tfds.core.DatasetBuilder, cfg: DataConfig, name: str, field: str):
    """The feature that config.data.<field> names, of a data set that has an image, too."""
    features = dict(builder.info.features)
    for wanted, why in (("image", "which it needs"), (name, f"the config.data.{field}")):
        if wanted not in features:
            raise SetupError(
                f"The data set {cfg.name!r} has no feature {wanted!r}, {why}; it has "
                f"{', '.join(features)}."
            )
    return features[name]


def _open(builder: tfds.core.DatasetBuilder, cfg: DataConfig, split: str, fields: dict) -> Records:
    features = {name: builder.info.features[name] for name in fields.values()}
    try:
        raw = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
        # The files alone: tfds's own source would bring the builder's module into every worker.
        return Records(raw.data_source, tfds.features.FeaturesDict(features), fields)
    except (ValueError, KeyError) as error:
        known = ", ".join(builder.info.splits)
        raise SetupError(
            f"{cfg.name!r} has no split {split!r} ({error}). Its splits are {known}; parts are "
            f"written as 'train[:90%]'."
        ) from None
    except NotImplementedError:
        raise SetupError(
            f"{cfg.name!r} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
            f"which has no random access. Prepare it as ArrayRecord: `tfds build {cfg.name} "
            f"--file_format=array_record`."
        ) from None


def version(cfg: DataConfig) -> str:
    """Of the prepared data set, as tfds names it: another one may have other images."""
    return str(_builder(cfg).version)


def open_training_source(cfg: DataConfig, masks: bool = False) -> Records:
    """The training split, with masks in place of labels if asked for.

    Raises:
      SetupError: as `open_source`, or its size is not config.data.train_examples.
    """
    source = (open_masks if masks else open_source)(cfg, cfg.train_split)
    if len(source) != cfg.train_examples:
        raise ConfigError(
            f"config.data.train_examples is {cfg.train_examples}, but {cfg.name!r} has "
            f"{len(source)} examples in {cfg.train_split!r}. Set it to that: the number of steps "
            f"follows from it."
        )
    return source


def _builder(cfg: DataConfig) -> tfds.core.DatasetBuilder:
    name, _, variant = cfg.name.partition("/")
    try:
        if name == "fractals":
            return fractals.prepare(variant, cfg.data_dir)
        builder = tfds.builder(cfg.name, data_dir=cfg.data_dir or None)
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SetupError(
            f"config.data.name is {cfg.name!r}, which tfds does not know: {reason}"
        ) from None
    except OSError as error:
        raise SetupError(
            f"The data set {cfg.name!r} cannot be made or read in "
            f"{cfg.data_dir or 'the default directory of tfds'}: {error}. Set config.data.data_dir "
            f"to a directory that you own."
        ) from None
    if not epath.Path(builder.data_dir).exists():
        raise SetupError(
            f"The data set {cfg.name!r} is not in {builder.data_dir}. Prepare it there with "
            f"`tfds build {cfg.name} --file_format=array_record`, or set config.data.data_dir to "
            f"where it is. config.data.name='fractals/tiny' needs no preparation."
        )
    return builder
