"""The records of tfds data sets: found, checked against the config, and read at random."""

import bisect
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError

from supmim_jax.config import ConfigError, DataConfig, SetupError
from supmim_jax.data import fractals, metadata, readers, seals
from supmim_jax.data.decode import BrokenRecord

# What ArrayRecord raises for a wrong checksum, and a parser for a record of another form.
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, DecodeError)
PREPARE = "python -m supmim_jax.data.prepare"


class Shards(Sequence):
    """The encoded records of a split, in order; which of them its parts are, tfds says."""

    def __init__(self, parts: Sequence):
        self.starts = list(itertools.accumulate((part.take for part in parts), initial=0))
        self.skipped = [part.skip for part in parts]
        self.readers = readers.Readers([str(part.filename) for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> bytes:
        part = bisect.bisect_right(self.starts, index) - 1
        return self.readers.read(part, self.skipped[part] + index - self.starts[part])


@dataclass(frozen=True)
class Records(Sequence):
    """Random access to {"image": encoded bytes, ...}; features that `fields` lacks stay unread.

    Reading raises BrokenRecord where the file's checksums or the record's form are wrong. A record
    of float32 images has {"floats": True}, too.
    """

    raw: Sequence[bytes]
    features: tfds.features.FeaturesDict
    fields: dict[str, str]  # from our names ("label", "mask") to those of the data set

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        encoded = [name for ours, name in self.fields.items() if ours in ("image", "mask")]
        try:
            found = self.features.deserialize_example_np(
                self.raw[index], decoders=dict.fromkeys(encoded, tfds.decode.SkipDecoding())
            )
        except UNREADABLE as error:
            raise BrokenRecord(f"Record {index} cannot be read: {error}") from None
        floats = {"floats": True} if self.features["image"].np_dtype == np.float32 else {}
        return {ours: found[name] for ours, name in self.fields.items()} | floats


def open_source(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "label".

    `fractals` is built on first use; everything else must have been prepared.

    Raises:
      SetupError: the data set, its split or a field is missing, or is not what the config says.
    """
    builder = _builder(cfg)
    feature = _feature(builder, cfg, cfg.label_field, "label_field")
    if not isinstance(feature, tfds.features.ClassLabel):
        others = _of_kind(builder, tfds.features.ClassLabel)
        raise SetupError(
            f"The data set {cfg.name!r} has no single class in its feature {cfg.label_field!r} "
            f"(config.data.label_field), which is {_shown(feature)}; expected is a ClassLabel. "
            f"Name one of {others}, or make a data set with one class for each image."
        )
    if feature.num_classes != cfg.num_classes:
        raise SetupError(
            f"config.data.num_classes is {cfg.num_classes}, but the data set {cfg.name!r} has "
            f"{feature.num_classes or 'no'} classes in its feature {cfg.label_field!r}."
        )
    return _open(builder, cfg, split, {"image": "image", "label": cfg.label_field})


def open_masks(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "mask"; the data set need not have labels.

    Raises:
      SetupError: the data set, its split or the masks are missing.
    """
    builder = _builder(cfg)
    feature = _feature(builder, cfg, cfg.masks.field, "masks.field")
    if not isinstance(feature, tfds.features.Image) or feature.np_dtype == np.float32:
        raise SetupError(
            f"config.data.masks.field is {cfg.masks.field!r}, which is no image of whole numbers "
            f"in {cfg.name!r}: it is {_shown(feature)}. Name one of "
            f"{_of_kind(builder, tfds.features.Image)}."
        )
    return _open(builder, cfg, split, {"image": "image", "mask": cfg.masks.field})


def _feature(builder: tfds.core.DatasetBuilder, cfg: DataConfig, name: str, field: str):
    """The feature that config.data.<field> names, of a data set that has an image, too."""
    features = dict(builder.info.features)
    check_image(features, cfg.name)
    if name not in features:
        raise SetupError(
            f"The data set {cfg.name!r} has no feature {name!r}, the config.data.{field}; it has "
            f"{', '.join(features)}."
        )
    if features["image"].np_dtype != np.uint8 and not cfg.max_value:
        raise SetupError(
            f"The data set {cfg.name!r} has 'image' as {_shown(features['image'])}, and nothing "
            f"says which value is white. Set config.data.max_value to that: 65535 of photographs "
            f"of 16 bits, 4095 of data of 12 bits, 1 of floats from 0 to 1."
        )
    return features[name]


def check_image(features: Mapping[str, tfds.features.FeatureConnector], name: str) -> None:
    """Raises SetupError unless a data set has one encoded image, in its feature 'image'."""
    image = dict(features).get("image")
    if not isinstance(image, tfds.features.Image):
        found = f"'image' as {_shown(image)}" if image else f"{', '.join(features)}, no 'image'"
        raise SetupError(
            f"The data set {name!r} has {found}; it needs one encoded image in 'image' "
            f"(tfds.features.Image). Write the images as files and make a data set of them: "
            f"`{PREPARE} --image_folder`."
        )


def _shown(feature: tfds.features.FeatureConnector) -> str:
    """A feature as a message repeats it, in one line."""
    return " ".join(repr(feature).split())[:120]


def _of_kind(builder: tfds.core.DatasetBuilder, kind: type) -> str:
    found = [name for name, feature in builder.info.features.items() if isinstance(feature, kind)]
    return ", ".join(found) or "those that it has not"


def _open(builder: tfds.core.DatasetBuilder, cfg: DataConfig, split: str, fields: dict) -> Records:
    if builder.info.file_format.value != "array_record":
        raise SetupError(
            f"{cfg.name!r} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
            f"which has no random access. Convert it: `{PREPARE} --from_tfrecord "
            f"{builder.data_dir} --data_dir <another directory>`."
        )
    features = {name: builder.info.features[name] for name in fields.values()}
    try:
        parts = builder.info.splits[split].file_instructions
        shards = tuple((str(part.filename), part.examples_in_shard) for part in parts)
    except Exception as error:  # whatever tfds makes of a split's name or of broken metadata
        known = ", ".join(builder.info.splits)
        raise SetupError(
            f"{cfg.name!r} has no split {split!r} ({metadata.first_line(error)}). Its splits are "
            f"{known}; parts are written as 'train[:90%]'. Set config.data.train_split and "
            f"config.data.eval_split."
        ) from None
    seals.check_shards(str(builder.data_dir), shards)
    return Records(Shards(parts), tfds.features.FeaturesDict(features), fields)


def feature_names(cfg: DataConfig) -> list[str]:
    """What each example of the data set has."""
    return list(_builder(cfg).info.features)


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
    metadata.check_name(cfg.name, "config.data.name")
    name, _, variant = cfg.name.partition("/")
    where = cfg.data_dir or "the default directory of tfds"
    try:
        if name == "fractals":
            return fractals.prepare(variant, cfg.data_dir)
        metadata.check_classes(cfg.name, cfg.data_dir)
        builder = tfds.builder(cfg.name, data_dir=cfg.data_dir or None)
    except SetupError:
        raise
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        raise SetupError(
            f"config.data.name is {cfg.name!r}, which is neither one of tfds's nor in {where} "
            f"(config.data.data_dir): {metadata.first_line(error)}. A folder of images becomes a "
            f"data set with `{PREPARE} --image_folder`."
        ) from None
    except OSError as error:
        raise SetupError(
            f"The data set {cfg.name!r} cannot be made or read in {where}: {error}. Set "
            f"config.data.data_dir to a directory that you own."
        ) from None
    except Exception as error:  # tfds wraps what json and protobuf raise in many ways
        raise SetupError(
            f"The data set {cfg.name!r} in {where} cannot be opened: its dataset_info.json, "
            f"features.json or names of classes are damaged ({metadata.first_line(error)}). "
            f"Prepare it again."
        ) from None
    if not epath.Path(builder.data_dir).exists():
        where = f" --data_dir {cfg.data_dir}" if cfg.data_dir else ""
        raise SetupError(
            f"The data set {cfg.name!r} is not in {builder.data_dir}. Prepare it there with "
            f"`{PREPARE} --name {cfg.name}{where}`, or set config.data.data_dir to where it is. "
            f"config.data.name='fractals/tiny' needs no preparation."
        )
    return builder
