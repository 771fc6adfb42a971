"""The records of tfds data sets: found, checked against the config, and read at random.

Someone else's data set may be hostile: tfds imports the modules that features.json names. So a
features.json may name only tfds's own classes, and a data set's name may not lead to another
directory.

`data.prepare` writes seals.json beside a data set. For each shard it has the size and a checksum of
both ends, for each small file a checksum of all bytes. Swapped, replaced, truncated or extended
shards are therefore noticed when the data set is opened. ArrayRecord's own checksums cover the
bytes between the ends, and are verified as records are read. Checksums detect accidents, not
attacks.

A process may often have only 1,024 files open, and a data set may have more shards, so few are open
at a time. A failing read (of a disk or a server) says nothing about the record and ends the run; a
broken record does not.
"""

import bisect
import concurrent.futures
import contextlib
import errno
import itertools
import json
import os
import re
import resource
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class Source:
    """A prepared data set, opened and checked once; its splits are checked as they are asked for.

    `fractals` is built on first use.

    Raises:
      SetupError: it is missing, cannot be read at random, or is not as data.prepare wrote it.
    """

    def __init__(self, cfg: DataConfig):
        self.cfg, self.builder = cfg, _builder(cfg)
        self.directory = epath.Path(self.builder.data_dir)
        self.version = str(self.builder.version)  # another one may have other images
        self.features = dict(self.builder.info.features)
        check_image(self.features, cfg.name)
        stored = self.builder.info.file_format.value
        if stored != "array_record":
            raise SetupError(
                f"{cfg.name!r} in {self.directory} is stored as {stored}, which has no random "
                f"access. Convert it: `{PREPARE} --from_tfrecord {self.directory} --data_dir "
                f"<another directory>`."
            )
        check_checksums(self.directory)

    def records(self, split: str, beside: str = "label") -> "Records":
        """The records of a split, each with "image" and what is asked for beside it.

        Args:
          split: as tfds writes it, such as "train[:90%]".
          beside: "label" or "mask"; "" gives "label" where the data set has labels.

        Raises:
          SetupError: the split or a field is missing, or is not what the config says.
        """
        cfg, fields = self.cfg, {"image": "image"}
        if beside == "mask":
            self._check_feature("masks.field", cfg.masks.field, tfds.features.Image)
            fields["mask"] = cfg.masks.field
        elif beside or isinstance(self.features.get(cfg.label_field), tfds.features.ClassLabel):
            fields["label"] = cfg.label_field
        if beside == "label":
            self._check_feature("label_field", cfg.label_field, tfds.features.ClassLabel)
            classes = self.features[cfg.label_field].num_classes
            if classes != cfg.num_classes:
                raise SetupError(
                    f"config.data.num_classes is {cfg.num_classes}, but the data set {cfg.name!r} "
                    f"has {classes or 'no'} classes in its feature {cfg.label_field!r}."
                )
        splits = self.builder.info.splits
        try:
            parts = splits[split].file_instructions
            # A path that leads elsewhere stays whole, and so is no name of the directory.
            prefix = f"{self.directory}/"
            counts = {
                str(epath.Path(part.filename)).removeprefix(prefix): part.examples_in_shard
                for part in parts
            }
        except Exception as error:  # whatever tfds makes of a split's name or of broken metadata
            raise SetupError(
                f"{cfg.name!r} has no split {split!r} ({_first_line(error)}). Its splits are "
                f"{', '.join(splits)}; parts are written as 'train[:90%]'. Set "
                f"config.data.train_split and config.data.eval_split."
            ) from None
        # Ids count on it: with one record more or less in a file, those behind it would move.
        if wrong := damage(self.directory, counts):
            raise SetupError(
                f"The data set in {self.directory} is damaged: {wrong}. Copy it again, or remove "
                f"the directory and prepare it again."
            )
        features = {name: self.features[name] for name in fields.values()}
        return Records(Shards(parts), tfds.features.FeaturesDict(features), fields)

    def _check_feature(self, field: str, name: str, kind: type) -> None:
        """Raises SetupError unless the feature config.data.<field> is of this kind and readable."""
        whole = {x: f for x, f in self.features.items() if f.np_dtype != np.float32}
        fit = [x for x, feature in whole.items() if isinstance(feature, kind)]
        if name not in fit:
            has = _shown(self.features[name]) if name in self.features else "no feature"
            raise SetupError(
                f"config.data.{field} is {name!r}, {has} in the data set {self.cfg.name!r}; "
                f"expected is a {kind.__name__} of whole numbers: {', '.join(fit) or 'none here'}."
            )
        image = self.features["image"]
        if image.np_dtype != np.uint8 and not self.cfg.max_value:
            raise SetupError(
                f"The data set {self.cfg.name!r} has 'image' as {_shown(image)}. Set "
                f"config.data.max_value to what is white: 65535 for photographs of 16 bits, 4095 "
                f"for data of 12 bits, 1 for floats from 0 to 1."
            )


def _builder(cfg: DataConfig) -> tfds.core.DatasetBuilder:
    """tfds's builder of the data set, which exists."""
    if not cfg.name:
        raise SetupError(
            "config.data.name is '', no name of a data set: these weights were imported without "
            "--config, and no data belong to them. Probe them with --config "
            "configs/probes/<name>.py, or import them with a --config that names a data set."
        )
    check_name(cfg.name, "config.data.name")
    name, _, variant = cfg.name.partition("/")
    where = cfg.data_dir or "the default directory of tfds"
    try:
        if name == "fractals":
            return fractals.prepare(variant, cfg.data_dir)
        for directory in _versions(cfg.name, cfg.data_dir):
            check_classes(directory / "features.json")
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
            f"(config.data.data_dir): {_first_line(error)}. Prepare it: `{PREPARE} --name "
            f"{cfg.name}`, or of images `{PREPARE} --image_folder`. If it is there, its metadata "
            f"are damaged: prepare it again."
        ) from None
    if not epath.Path(builder.data_dir).exists():
        option = f" --data_dir {cfg.data_dir}" if cfg.data_dir else ""
        raise SetupError(
            f"The data set {cfg.name!r} is not in {builder.data_dir}. Set config.data.data_dir to "
            f"where it is, or prepare it: `{PREPARE} --name {cfg.name}{option}`."
        )
    return builder


def _versions(name: str, data_dir: str) -> Iterable[epath.Path]:
    """All directories that a data set of this name may be in: <name>/[<config>/]<version>."""

    def below(path: epath.Path) -> list[epath.Path]:  # a pattern would pass over hidden ones
        return [x for x in path.iterdir() if x.is_dir()] if path.is_dir() else []

    stem, _ = naming.parse_builder_name_kwargs(name)  # tfds may spell the name in another way
    for root in file_utils.list_data_dirs(data_dir or None):
        # Where the name has no config, the data set says which it is.
        above = below(epath.Path(root) / str(stem))
        yield from itertools.chain(above, *map(below, above))


def check_name(name: str, field: str) -> None:
    """Raises SetupError unless tfds could have given the name; it may not be a path."""
    if not NAME.fullmatch(name):
        raise SetupError(
            f"{field} is {name!r}, which is no name of a data set: give <name>, <name>/<config> or "
            f"<name>:<version> in letters, digits and underscores. Where it is goes to data_dir."
        )


def check_classes(path: epath.Path) -> None:
    """Raises SetupError if a features.json is unreadable or names classes from outside tfds.

    tfds would import the module of any class: a data set from elsewhere could run code.
    """
    classes: list[str] = []

    def collect(values: dict) -> None:
        classes.extend(str(values[key]) for key in CLASS_KEYS if isinstance(values.get(key), str))

    try:
        if path.exists():
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


def _shown(feature: tfds.features.FeatureConnector) -> str:
    """A feature in one line, for messages."""
    return " ".join(repr(feature).split())[:120]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(". ")[:300]


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


class Shards(Sequence):
    """The encoded records of a split, in order, as tfds describes its parts."""

    def __init__(self, parts: Sequence):
        self.starts = list(itertools.accumulate((part.take for part in parts), initial=0))
        self.skipped = [part.skip for part in parts]
        self.readers = Readers([str(part.filename) for part in parts])

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> bytes:
        part = bisect.bisect_right(self.starts, index) - 1
        return self.readers.read(part, self.skipped[part] + index - self.starts[part])


class Readers:
    """Reads records of many files, at most most_open() open at once; can be pickled."""

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
            with self.lock:
                if index not in self.open:
                    while len(self.open) >= most_open():
                        self.open.popitem(last=False)  # closed when no thread reads from it
                    reader = array_record_module.ArrayRecordReader(self.paths[index], **OPTIONS)
                    self.open[index] = reader
                self.open.move_to_end(index)
                reader = self.open[index]
            return reader.read([position])[0]
        except (RuntimeError, ValueError) as error:
            with self.lock:
                self.open.pop(index, None)  # it would repeat its fault for ever
            _check_system(error, self.paths[index])
            raise


def allow_many_files() -> None:
    """Raises this process's limit of open files as far as the system allows."""
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
    """Raises SetupError or OSError if a system call failed, rather than the data being wrong."""
    failed = FAILED_CALL.search(str(error))
    if not failed:
        return
    reason = failed[1].strip()
    number = ERRNO.get(reason, errno.EIO)
    if number == errno.EMFILE:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        raise SetupError(
            f"{path} cannot be opened: this process may have {soft} files open, and has. Raise "
            f"that limit (`ulimit -n {hard}`; an administrator may set more)."
        )
    raise OSError(number, reason, path)


def count(path: str) -> int:
    """The number of records in a file; reads only its end.

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


def damage(directory: epath.Path, shards: Mapping[str, int]) -> str:
    """What is wrong with files that should have these numbers of records; "" if nothing is."""
    there = {path.name for path in directory.iterdir()}

    def fault(name: str) -> str:
        if name not in there:
            return f"{name} is missing"
        try:
            records = count(str(directory / name))
        except ValueError as error:
            return f"{name} {error}"
        right = records == shards[name]
        return "" if right else f"{name} has {records} records, expected {shards[name]}"

    return first_few([text for text in _of_each(fault, shards) if text])


def _of_each(function: Callable, items: Iterable) -> list:
    """function(item) of each item, by a few threads."""
    with concurrent.futures.ThreadPoolExecutor(min(64, most_open())) as pool:
        return list(pool.map(function, items))


def mark(encoded: bytes) -> int:
    """CRC-32 of an image's length and both ends (the whole of a small image)."""
    checksum = zlib.crc32(len(encoded).to_bytes(8, "little"))
    if len(encoded) <= 2 * IMAGE_END:
        return zlib.crc32(encoded, checksum)
    return zlib.crc32(encoded[-IMAGE_END:], zlib.crc32(encoded[:IMAGE_END], checksum))


def _checksum(path: epath.Path) -> str | None:
    """Size and CRC-32 of a file (of a shard, of its ends); None if it does not exist."""
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


def write_checksums(directory: epath.Path) -> None:
    """Writes seals.json with all files of a complete data set."""
    paths = [path for path in sorted(directory.iterdir()) if path.name != CHECKSUMS]
    checksums = dict(zip((path.name for path in paths), _of_each(_checksum, paths)))
    storage.write_json(directory / CHECKSUMS, checksums)


def check_checksums(directory: epath.Path) -> None:
    """Raises SetupError if there is a seals.json and a file in it has changed."""
    path = directory / CHECKSUMS
    if not path.exists():
        return
    cure = "Prepare the data set again, or remove this file to train without its checks."
    expected = storage.read_json(path, cure)
    if not isinstance(expected, dict) or set(map(type, expected.values())) != {str}:
        raise SetupError(f"{path} cannot be used: it is no object of texts. {cure}")
    if outside := [name for name in expected if epath.Path(name).name != name]:
        raise SetupError(f"{path} cannot be used: it names {outside[0]!r}. {cure}")
    found = _of_each(_checksum, [directory / name for name in expected])
    pairs = zip(expected.items(), found)
    wrong = [f"{name} is {x or 'missing'}, expected {y}" for (name, y), x in pairs if x != y]
    if wrong:
        raise SetupError(
            f"The data set in {directory} is not as data.prepare wrote it (size and checksum, by "
            f"{CHECKSUMS}): {first_few(wrong)}. Copy or prepare it again; if the change was meant, "
            f"remove {CHECKSUMS}."
        )
