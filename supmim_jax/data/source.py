"""The records of tfds data sets: found, checked against the config, and read at random.

What a data set from elsewhere may say of itself: a name, and the classes of its features.

ArrayRecord files read at random, few of them open at a time.

A process may have 1,024 files open, often, and a data set may have more shards. And a read that the
system refuses (no more open files, a disk or a server that fails) says nothing of the record: it
ends the run, which a record that is broken does not.

Seals: what tells, without reading all of it, whether a file is still the one that was written.

`data.prepare` leaves seals.json beside a data set: of each shard its size and a checksum of both
ends, of the small files one of all their bytes. Shards that were swapped, replaced, cut or appended
to are found when the data set is opened. Bytes between the ends are in ArrayRecord's checksums,
which are looked at record by record. Checksums are no signatures: they find accidents."""

import bisect
import concurrent.futures
import contextlib
import errno
import functools
import itertools
import json
import os
import re
import resource
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from supmim_jax.config import DataConfig
from supmim_jax.data import fractals
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.errors import ConfigError, SetupError

NAME = re.compile(r"\w[\w-]*(/\w[\w.+-]*)?(:[\d*]+\.[\d*]+\.[\d*]+)?", re.ASCII)
FEATURES = "features.json"
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")  # of a class in features.json


def check_name(name: str, field: str) -> None:
    """Raises SetupError unless it is a name as tfds gives them, which leads to no other place."""
    if not NAME.fullmatch(name):
        raise SetupError(
            f"{field} is {name!r}, which is no name of a data set: give <name>, <name>/<config> or "
            f"<name>:<version> in letters, digits and underscores. Where it is goes to data_dir."
        )


def check_classes(name: str, data_dir: str) -> None:
    """Raises SetupError if a features.json names a class that is not of tfds.

    tfds would import its module, whatever that is: a data set from elsewhere could run code.
    """
    place, _ = naming.parse_builder_name_kwargs(name)  # which tfds may spell in another way
    for root in file_utils.list_data_dirs(data_dir or None):
        directory = epath.Path(root) / str(place)
        if not directory.is_dir():
            continue
        # Of all configs: tfds takes one that the data set names, where the name has none.
        for path in _features(directory, depth=2):
            try:
                found = list(_named(json.loads(path.read_text())))
            except (OSError, ValueError, RecursionError) as error:
                raise SetupError(
                    f"{path} cannot be read: {first_line(error)}. Prepare the data set again."
                ) from None
            foreign = [x for x in found if not x.startswith("tensorflow_datasets.")]
            if foreign:
                raise SetupError(
                    f"{path} names the class {foreign[0]!r}, which is not of tensorflow_datasets: "
                    f"opening it would run code of another module. Only features of tfds are read."
                )


def _features(directory: epath.Path, depth: int) -> Iterator[epath.Path]:
    """The features.json of each directory below; a pattern would pass over [ and hidden ones."""
    for path in directory.iterdir() if depth else ():
        if path.is_dir():
            if (path / FEATURES).exists():
                yield path / FEATURES
            yield from _features(path, depth - 1)


def _named(values: Any) -> Iterator[str]:
    """The classes that a features.json names."""
    if isinstance(values, dict):
        yield from (str(values[key]) for key in CLASS_KEYS if isinstance(values.get(key), str))
    for inner in values.values() if isinstance(values, dict) else values:
        if isinstance(inner, dict | list):
            yield from _named(inner)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(". ")[:300]


ENOUGH = 2**16  # files; more makes nothing faster
FAILED = re.compile(r"\w+\(\) failed: ([^;]+)")  # what ArrayRecord says of a system call
NUMBERS = {os.strerror(number): number for number in errno.errorcode}
OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}


def allow_many_files() -> None:
    """Raises this process's limit to open files to what the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH if hard == resource.RLIM_INFINITY else min(hard, ENOUGH)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_open() -> int:
    """How many files one reader may hold; a process has a few readers, and files of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH if soft == resource.RLIM_INFINITY else max(soft // 8, 1)


def check_system(error: Exception, path: str) -> None:
    """Returns if ArrayRecord found fault with what a file holds.

    Raises:
      SetupError: this process has too many files open.
      OSError: another call to the system failed.
    """
    said = FAILED.search(str(error))
    if not said:
        return
    number = NUMBERS.get(said[1].strip(), errno.EIO)
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise SetupError(
            f"{path} cannot be opened: this process has as many files open as it may, {soft}. "
            f"Raise that limit (`ulimit -n 65536`; it may be set to {hard} here, and by an "
            f"administrator to more), then run the same command again."
        )
    raise OSError(number, said[1].strip(), path)


def count(path: str) -> int:
    """The records of a file, of which only the end is read.

    Raises:
      ValueError: it is cut, or of another form.
      SetupError, OSError: as `check_system`.
    """
    reader = array_record_module.ArrayRecordReader(path, **OPTIONS)
    try:
        found = reader.num_records()
        reader.close()  # which tells what has gone wrong before
    except (RuntimeError, ValueError) as error:
        check_system(error, path)
        raise ValueError(f"is cut or no ArrayRecord file ({str(error)[:200]})") from None
    return found


class Readers:
    """Reads records of many files, of which it holds most_open(); travels to worker processes."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.open: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self.lock = threading.Lock()

    def __getstate__(self) -> Sequence[str]:
        return self.paths

    def __setstate__(self, paths: Sequence[str]) -> None:
        self.__init__(paths)

    def read(self, index: int, position: int) -> bytes:
        """The record at a position of the file with this index.

        Raises:
          RuntimeError, ValueError, IndexError: what ArrayRecord finds wrong with the file.
          SetupError, OSError: as `check_system`.
        """
        try:
            return self._reader(index).read([position])[0]
        except (RuntimeError, ValueError) as error:
            with self.lock:
                self.open.pop(index, None)  # it would repeat its fault for ever
            check_system(error, self.paths[index])
            raise

    def _reader(self, index: int) -> array_record_module.ArrayRecordReader:
        with self.lock:
            if index not in self.open:
                while len(self.open) >= most_open():
                    self.open.popitem(last=False)  # closed when no thread reads from it any more
                path = self.paths[index]
                self.open[index] = array_record_module.ArrayRecordReader(path, **OPTIONS)
            self.open.move_to_end(index)
            return self.open[index]


FILE = "seals.json"
END = 2**12  # bytes at each end of an image
SHARD_END = 2**16  # of a shard
UNSEALED = (FILE, "lock")


def mark(encoded: bytes) -> int:
    """CRC-32 of an image's length and of its ends, and so of all of a small one."""
    found = zlib.crc32(len(encoded).to_bytes(8, "little"))
    if len(encoded) <= 2 * END:
        return zlib.crc32(encoded, found)
    return zlib.crc32(encoded[-END:], zlib.crc32(encoded[:END], found))


def seal(path: epath.Path) -> str:
    """The seal of a file."""
    size = path.stat().length
    with path.open("rb") as file:
        if "array_record" not in path.name:
            return f"{size}-{zlib.crc32(file.read()):08x}"
        found = zlib.crc32(file.read(SHARD_END))
        file.seek(max(size - SHARD_END, 0))
        return f"{size}-{zlib.crc32(file.read(SHARD_END), found):08x}"


def write(directory: epath.Path) -> None:
    """Seals all files of a data set that is complete."""
    paths = sorted(path for path in directory.iterdir() if path.name not in UNSEALED)
    paths = [path for path in paths if not path.name.endswith(".part")]
    found = dict(zip((path.name for path in paths), _each(paths), strict=True))
    part = directory / f"{FILE}.part"
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(directory / FILE)


def check(directory: epath.Path) -> None:
    """Returns if every sealed file is as it was; at once for a data set without seals.

    Raises:
      SetupError: a file is missing or is another one, or the seals cannot be read.
    """
    path = directory / FILE
    if not path.exists():
        return
    try:
        wanted = json.loads(path.read_text())
        if not isinstance(wanted, dict) or not wanted or set(map(type, wanted.values())) != {str}:
            raise ValueError("it is no object of texts")
        strange = [name for name in wanted if epath.Path(name).name != name]
        if strange:
            raise ValueError(f"it names {strange[0]!r}, which is not in the directory")
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(
            f"{path} cannot be used: {error}. Prepare the data set again, or remove this file to "
            f"train without its checks."
        ) from None
    paths = [directory / name for name in wanted]
    wrong = [
        f"{path.name} {'is missing' if found is None else f'is {found}, expected {seal}'}"
        for path, found, seal in zip(paths, _each(paths), wanted.values(), strict=True)
        if found != seal
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise SetupError(
            f"The data set in {directory} is not as data.prepare wrote it: {'; '.join(wrong[:3])}"
            f"{more} (size and checksum, by {FILE}). Copy it again or prepare it again; if the "
            f"change was meant, remove {FILE}."
        )


@functools.cache  # a process looks once
def check_shards(directory: str, shards: tuple[tuple[str, int], ...]) -> None:
    """Raises SetupError unless the files are whole, in place and of as many records as told.

    Ids count on it: with one record more or less in a file, those behind it would move.
    """
    check(epath.Path(directory))

    def fault(shard: tuple[str, int]) -> str:
        path, expected = shard
        if epath.Path(path).parent != epath.Path(directory):
            return f"{path} is not in the directory"
        try:
            found = count(path)
        except FileNotFoundError:
            return f"{epath.Path(path).name} is missing"
        except ValueError as error:
            return f"{epath.Path(path).name} {error}"
        told = f"{epath.Path(path).name} has {found} records, dataset_info.json says {expected}"
        return "" if found == expected else told

    with _pool() as pool:
        wrong = next(filter(None, pool.map(fault, shards)), None)
    if wrong:
        raise SetupError(
            f"The data set in {directory} is damaged: {wrong}. Copy it again from where it came, "
            f"or remove the directory and prepare it again."
        )


def _each(paths: list[epath.Path]) -> list[str | None]:
    """The seal of each file; None for one that is not there."""

    def one(path: epath.Path) -> str | None:
        try:
            return seal(path)
        except FileNotFoundError:
            return None

    with _pool() as pool:
        return list(pool.map(one, paths))


def _pool() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(min(64, most_open()))


# What ArrayRecord raises for a wrong checksum, and a parser for a record of another form.
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, DecodeError)
PREPARE = "python -m supmim_jax.data.prepare"


class Shards(Sequence):
    """The encoded records of a split, in order; which of them its parts are, tfds says."""

    def __init__(self, parts: Sequence):
        self.starts = list(itertools.accumulate((part.take for part in parts), initial=0))
        self.skipped = [part.skip for part in parts]
        self.readers = Readers([str(part.filename) for part in parts])

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
            f"{cfg.name!r} has no split {split!r} ({first_line(error)}). Its splits are "
            f"{known}; parts are written as 'train[:90%]'. Set config.data.train_split and "
            f"config.data.eval_split."
        ) from None
    check_shards(str(builder.data_dir), shards)
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
    check_name(cfg.name, "config.data.name")
    name, _, variant = cfg.name.partition("/")
    where = cfg.data_dir or "the default directory of tfds"
    try:
        if name == "fractals":
            return fractals.prepare(variant, cfg.data_dir)
        check_classes(cfg.name, cfg.data_dir)
        builder = tfds.builder(cfg.name, data_dir=cfg.data_dir or None)
    except SetupError:
        raise
    except (ValueError, tfds.core.DatasetNotFoundError) as error:
        raise SetupError(
            f"config.data.name is {cfg.name!r}, which is neither one of tfds's nor in {where} "
            f"(config.data.data_dir): {first_line(error)}. A folder of images becomes a "
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
            f"features.json or names of classes are damaged ({first_line(error)}). "
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
