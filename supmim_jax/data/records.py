"""The records of tfds data sets: found, checked against the config, and read at random."""

from collections.abc import Sequence
from dataclasses import dataclass

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf.message import DecodeError

from supmim_jax.config import ConfigError, DataConfig, SetupError
from supmim_jax.data import fractals, metadata, seals
from supmim_jax.data.decode import BrokenRecord

# What ArrayRecord raises for a wrong checksum, and a parser for a record of another form.
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, DecodeError)
PREPARE = "python -m supmim_jax.data.prepare"


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
        shards = tuple(
            (str(part.filename), part.examples_in_shard)
            for part in builder.info.splits[split].file_instructions
        )
        raw = builder.as_data_source(
            split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
        )
    except NotImplementedError:
        raise SetupError(
            f"{cfg.name!r} in {builder.data_dir} is stored as {builder.info.file_format.value}, "
            f"which has no random access. Convert it: `{PREPARE} --from_tfrecord "
            f"{builder.data_dir} --data_dir <another directory>`."
        ) from None
    except Exception as error:  # whatever tfds makes of a split's name or of broken metadata
        known = ", ".join(builder.info.splits)
        raise SetupError(
            f"{cfg.name!r} has no split {split!r} ({metadata.first_line(error)}). Its splits are "
            f"{known}; parts are written as 'train[:90%]'. Set config.data.train_split and "
            f"config.data.eval_split."
        ) from None
    seals.check_shards(str(builder.data_dir), shards)
    # The files alone: tfds's own source would bring the builder's module into every worker.
    return Records(raw.data_source, tfds.features.FeaturesDict(features), fields)


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
