"""The records of tfds data sets: found, checked against the config, and read at random.

Of a data set from elsewhere, its name may lead to no other place, and its features.json may name
classes of tfds alone, as tfds imports the modules of what is named there.

`data.prepare` leaves seals.json beside a data set: of each shard its size and a checksum of both
ends, of the small files one of all their bytes. So shards that were swapped, replaced, cut or
appended to are found when the data set is opened. Bytes between the ends are in ArrayRecord's own
checksums, which are verified as records are read. Checksums are no signatures: they find accidents.

A process may often have 1,024 files open, and a data set may have more shards: few are open at a
time. A read that the system refuses (a disk or a server that fails) says nothing of the record, and
ends the run; a record that is broken does not.
"""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from etils import epath
from google.protobuf.message import DecodeError
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from supmim_jax import storage
from supmim_jax.config import DataConfig
from supmim_jax.data import fractals
from supmim_jax.data.decode import BrokenRecord
from supmim_jax.errors import SetupError, first_few

PREPARE = "python -m supmim_jax.data.prepare"
NAME = re.compile(r"\w[\w-]*(/\w[\w.+-]*)?(:[\d*]+\.[\d*]+\.[\d*]+)?", re.ASCII)
FEATURES = "features.json"
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")  # of a class in features.json

MANY_FILES = 2**16  # more makes nothing faster
FAILED_CALL = re.compile(r"\w+\(\) failed: ([^;]+)")  # what ArrayRecord says of a system call
ERRNO = {os.strerror(number): number for number in errno.errorcode}
OPTIONS = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 2**15}
# What ArrayRecord raises for a wrong checksum, and a parser for a record of another form.
UNREADABLE = (RuntimeError, ValueError, LookupError, TypeError, DecodeError)

CHECKSUMS = "seals.json"
IMAGE_END = 2**12  # bytes at each end of an image that its checksum is of
SHARD_END = 2**16  # and of a shard


def check_name(name: str, field: str) -> None:
    """Raises SetupError unless it is a name as tfds gives them, which leads to no other place."""
    if not NAME.fullmatch(name):
        raise SetupError(
            f"{field} is {name!r}, which is no name of a data set: give <name>, <name>/<config> or "
            f"<name>:<version> in letters, digits and underscores. Where it is goes to data_dir."
        )


def check_classes(path: epath.Path) -> None:
    """Returns if a features.json names classes of tfds alone, or is not there.

    tfds would import the module of any class: a data set from elsewhere could run code.

    Raises:
      SetupError: it cannot be read, or names another class.
    """
    if not path.exists():
        return
    classes: list[str] = []

    def collect(values: dict) -> None:
        classes.extend(str(values[key]) for key in CLASS_KEYS if isinstance(values.get(key), str))

    try:
        json.loads(path.read_text(), object_hook=collect)
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(
            f"{path} cannot be read: {_first_line(error)}. Prepare the data set again."
        ) from None
    if foreign := [x for x in classes if not x.startswith("tensorflow_datasets.")]:
        raise SetupError(
            f"{path} names the class {foreign[0]!r}, which is not of tensorflow_datasets: opening "
            f"it would run code of another module. Only tfds's features are read."
        )


def _check_classes(name: str, data_dir: str) -> None:
    """`check_classes` of all versions and configs of a data set of this name."""
    place, _ = naming.parse_builder_name_kwargs(name)  # tfds may spell the name in another way
    for root in file_utils.list_data_dirs(data_dir or None):
        # Where the name has no config, the data set says which it is.
        versions = _directories(epath.Path(root) / str(place))
        for directory in itertools.chain(versions, *map(_directories, versions)):
            check_classes(directory / FEATURES)


def _directories(above: epath.Path) -> list[epath.Path]:
    """Those in a directory; a pattern would pass over hidden ones, and over [ in a name."""
    return [path for path in above.iterdir() if path.is_dir()] if above.is_dir() else []


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(". ")[:300]


def allow_many_files() -> None:
    """Raises this process's limit to open files to what the system lets it have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MANY_FILES if hard == resource.RLIM_INFINITY else min(hard, MANY_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # macOS has a limit that it does not tell
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def most_open() -> int:
    """How many files one reader may hold; a process has a few readers, and files of its own."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MANY_FILES if soft == resource.RLIM_INFINITY else max(soft // 8, 1)


def _check_system(error: Exception, path: str) -> None:
    """Returns if ArrayRecord found fault with what a file holds.

    Raises:
      SetupError: this process has too many files open.
      OSError: another call to the system failed.
    """
    failed = FAILED_CALL.search(str(error))
    if not failed:
        return
    reason = failed[1].strip()
    number = ERRNO.get(reason, errno.EIO)
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise SetupError(
            f"{path} cannot be opened: this process has as many files open as it may, {soft}. "
            f"Raise that limit (`ulimit -n {hard}`; an administrator may set more)."
        )
    raise OSError(number, reason, path)


def count(path: str) -> int:
    """The records of a file, of which only the end is read.

    Raises:
      ValueError: it is cut, or of another form.
      SetupError, OSError: the system refuses to read it.
    """
    reader = array_record_module.ArrayRecordReader(path, **OPTIONS)
    try:
        records = reader.num_records()
        reader.close()  # which tells what has gone wrong before
    except (RuntimeError, ValueError) as error:
        _check_system(error, path)
        raise ValueError(f"is cut or no ArrayRecord file ({str(error)[:200]})") from None
    return records


class Readers:
    """Reads records of many files, of which it holds most_open(); travels to worker processes."""

    def __init__(self, paths: Sequence[str]):
        self.paths = paths
        self.open: OrderedDict[int, array_record_module.ArrayRecordReader] = OrderedDict()
        self.lock = threading.Lock()

    def __reduce__(self) -> tuple:
        return Readers, (self.paths,)

    def read(self, index: int, position: int) -> bytes:
        """The record at a position of the file with this index.

        Raises:
          RuntimeError, ValueError, IndexError: what ArrayRecord finds wrong with the file.
          SetupError, OSError: the system refuses to read it.
        """
        try:
            return self._reader(index).read([position])[0]
        except (RuntimeError, ValueError) as error:
            with self.lock:
                self.open.pop(index, None)  # it would repeat its fault for ever
            _check_system(error, self.paths[index])
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


def mark(encoded: bytes) -> int:
    """CRC-32 of an image's length and of its ends, and so of all of a small one."""
    checksum = zlib.crc32(len(encoded).to_bytes(8, "little"))
    if len(encoded) <= 2 * IMAGE_END:
        return zlib.crc32(encoded, checksum)
    return zlib.crc32(encoded[-IMAGE_END:], zlib.crc32(encoded[:IMAGE_END], checksum))


def _checksum(path: epath.Path) -> str | None:
    """Size and CRC-32 of a file, of a shard those of its ends; None if it is not there."""
    try:
        size = storage.stat(path).size
        with path.open("rb") as file:
            if "array_record" not in path.name:
                return f"{size}-{zlib.crc32(file.read()):08x}"
            first = zlib.crc32(file.read(SHARD_END))
            file.seek(max(size - SHARD_END, 0))
            return f"{size}-{zlib.crc32(file.read(SHARD_END), first):08x}"
    except FileNotFoundError:
        return None


def _of_each(function: Callable, items: Sequence) -> list:
    """function(item) of each item, by a few threads."""
    with concurrent.futures.ThreadPoolExecutor(min(64, most_open())) as pool:
        return list(pool.map(function, items))


def write_checksums(directory: epath.Path) -> None:
    """Writes seals.json, of all files of a data set that is complete."""
    paths = sorted(p for p in directory.iterdir() if p.name not in (CHECKSUMS, "lock"))
    paths = [path for path in paths if not path.name.endswith(".part")]
    checksums = dict(zip((path.name for path in paths), _of_each(_checksum, paths)))
    part = directory / f"{CHECKSUMS}.part"
    part.write_text(json.dumps(checksums, indent=1) + "\n")
    part.replace(directory / CHECKSUMS)


def _check_checksums(directory: epath.Path) -> None:
    """Returns if every file that seals.json names is as it was, or if there is none.

    Raises:
      SetupError: a file is missing or is another one, or seals.json cannot be read.
    """
    path = directory / CHECKSUMS
    if not path.exists():
        return
    try:
        expected = json.loads(path.read_text())
        if not isinstance(expected, dict) or set(map(type, expected.values())) != {str}:
            raise ValueError("it is no object of texts")
        outside = [name for name in expected if epath.Path(name).name != name]
        if outside:
            raise ValueError(f"it names {outside[0]!r}, which is not in the directory")
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(
            f"{path} cannot be used: {error}. Prepare the data set again, or remove this file to "
            f"train without its checks."
        ) from None
    checksums = _of_each(_checksum, [directory / name for name in expected])
    wrong = [
        f"{name} {f'is {checksum}, expected {expected[name]}' if checksum else 'is missing'}"
        for name, checksum in zip(expected, checksums)
        if checksum != expected[name]
    ]
    if wrong:
        raise SetupError(
            f"The data set in {directory} is not as data.prepare wrote it: {first_few(wrong)} "
            f"(size and checksum, by {CHECKSUMS}). Copy it again or prepare it again; if "
            f"the change was meant, remove {CHECKSUMS}."
        )


@functools.cache  # a process looks once
def check_shards(directory: str, shards: tuple[tuple[str, int], ...]) -> None:
    """Raises SetupError unless the files are whole, in place and of as many records as told.

    Ids count on it: with one record more or less in a file, those behind it would move.
    """
    _check_checksums(epath.Path(directory))

    def fault(shard: tuple[str, int]) -> str:
        path, expected = epath.Path(shard[0]), shard[1]
        if path.parent != epath.Path(directory):
            return f"{path} is not in the directory"
        try:
            records = count(str(path))
        except FileNotFoundError:
            return f"{path.name} is missing"
        except ValueError as error:
            return f"{path.name} {error}"
        if records == expected:
            return ""
        return f"{path.name} has {records} records, dataset_info.json says {expected}"

    wrong = next(filter(None, _of_each(fault, shards)), None)
    if wrong:
        raise SetupError(
            f"The data set in {directory} is damaged: {wrong}. Copy it again from where it came, "
            f"or remove the directory and prepare it again."
        )


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
        decoders = dict.fromkeys(encoded, tfds.decode.SkipDecoding())
        try:
            example = self.features.deserialize_example_np(self.raw[index], decoders=decoders)
        except UNREADABLE as error:
            raise BrokenRecord(f"Record {index} cannot be read: {error}") from None
        floats = {"floats": True} if self.features["image"].np_dtype == np.float32 else {}
        return {ours: example[name] for ours, name in self.fields.items()} | floats


def open_source(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "label".

    `fractals` is built on first use; everything else must have been prepared.

    Raises:
      SetupError: the data set, its split or a field is missing, or is not what the config says.
    """
    builder = _builder(cfg)
    label = _feature(builder, cfg, "label_field", cfg.label_field, tfds.features.ClassLabel)
    if label.num_classes != cfg.num_classes:
        raise SetupError(
            f"config.data.num_classes is {cfg.num_classes}, but the data set {cfg.name!r} has "
            f"{label.num_classes or 'no'} classes in its feature {cfg.label_field!r}."
        )
    return _open(builder, cfg, split, {"image": "image", "label": cfg.label_field})


def open_masks(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image" and "mask"; the data set need not have labels.

    Raises:
      SetupError: the data set, its split or the masks are missing.
    """
    builder = _builder(cfg)
    _feature(builder, cfg, "masks.field", cfg.masks.field, tfds.features.Image)
    return _open(builder, cfg, split, {"image": "image", "mask": cfg.masks.field})


def open_images(cfg: DataConfig, split: str) -> Records:
    """The records of a split, each with "image", and with "label" where the data set has labels.

    Raises:
      SetupError: the data set, its split or its images are missing.
    """
    builder = _builder(cfg)
    features = dict(builder.info.features)
    check_image(features, cfg.name)
    has_labels = isinstance(features.get(cfg.label_field), tfds.features.ClassLabel)
    fields = {"image": "image"} | ({"label": cfg.label_field} if has_labels else {})
    return _open(builder, cfg, split, fields)


def feature_names(cfg: DataConfig) -> list[str]:
    """What each example of the data set has."""
    return list(_builder(cfg).info.features)


def version(cfg: DataConfig) -> str:
    """Of the prepared data set, as tfds names it: another one may have other images."""
    return str(_builder(cfg).version)


def check_image(features: Mapping[str, tfds.features.FeatureConnector], name: str) -> None:
    """Raises SetupError unless a data set has one encoded image, in its feature 'image'."""
    image = dict(features).get("image")
    if not isinstance(image, tfds.features.Image):
        has = f"'image' as {_shown(image)}" if image else f"{', '.join(features)}, no 'image'"
        raise SetupError(
            f"The data set {name!r} has {has}; it needs one encoded image in 'image' "
            f"(tfds.features.Image). Write the images as files and make a data set of them: "
            f"`{PREPARE} --image_folder`."
        )


def _feature(
    builder: tfds.core.DatasetBuilder, cfg: DataConfig, field: str, name: str, kind: type
) -> tfds.features.FeatureConnector:
    """The feature `name`, config.data.<field>: of this kind, and beside an image.

    Raises:
      SetupError: there is no such feature, or no image whose white is known.
    """
    features = dict(builder.info.features)
    check_image(features, cfg.name)
    fit = {x: f for x, f in features.items() if isinstance(f, kind) and f.np_dtype != np.float32}
    if name not in fit:
        raise SetupError(
            f"config.data.{field} is {name!r}, which in the data set {cfg.name!r} is "
            f"{_shown(features[name]) if name in features else 'no feature'}. Expected is one "
            f"{kind.__name__} of whole numbers, of which it has {', '.join(fit) or 'none'}."
        )
    if features["image"].np_dtype != np.uint8 and not cfg.max_value:
        raise SetupError(
            f"The data set {cfg.name!r} has 'image' as {_shown(features['image'])}, and nothing "
            f"says which value is white. Set config.data.max_value to that: 65535 for photographs "
            f"of 16 bits, 4095 for data of 12 bits, 1 for floats from 0 to 1."
        )
    return fit[name]


def _shown(feature: tfds.features.FeatureConnector) -> str:
    """A feature as a message repeats it, in one line."""
    return " ".join(repr(feature).split())[:120]


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
        raise SetupError(
            f"{cfg.name!r} has no split {split!r} ({_first_line(error)}). Its splits are "
            f"{', '.join(builder.info.splits)}; parts are written as 'train[:90%]'. Set "
            f"config.data.train_split and config.data.eval_split."
        ) from None
    check_shards(str(builder.data_dir), shards)
    return Records(Shards(parts), tfds.features.FeaturesDict(features), fields)


def _builder(cfg: DataConfig) -> tfds.core.DatasetBuilder:
    check_name(cfg.name, "config.data.name")
    name, _, variant = cfg.name.partition("/")
    where = cfg.data_dir or "the default directory of tfds"
    try:
        if name == "fractals":
            return fractals.prepare(variant, cfg.data_dir)
        _check_classes(cfg.name, cfg.data_dir)
        builder = tfds.builder(cfg.name, data_dir=cfg.data_dir or None)
    except SetupError:
        raise
    except OSError as error:
        raise SetupError(
            f"The data set {cfg.name!r} cannot be made or read in {where}: {error}. Set "
            f"config.data.data_dir to a directory that you own."
        ) from None
    except Exception as error:  # tfds wraps what json and protobuf raise in many ways
        raise SetupError(
            f"config.data.name is {cfg.name!r}, which tfds cannot open in {where} "
            f"(config.data.data_dir): {_first_line(error)}. If it is there, its metadata are "
            f"damaged: prepare it again. A folder of images becomes a data set with `{PREPARE} "
            f"--image_folder`."
        ) from None
    if not epath.Path(builder.data_dir).exists():
        where = f" --data_dir {cfg.data_dir}" if cfg.data_dir else ""
        raise SetupError(
            f"The data set {cfg.name!r} is not in {builder.data_dir}. Prepare it there with "
            f"`{PREPARE} --name {cfg.name}{where}`, or set config.data.data_dir to where it is. "
            f"config.data.name='fractals/tiny' needs no preparation."
        )
    return builder
