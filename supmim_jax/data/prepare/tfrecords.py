"""A prepared TFRecord data set of tfds as ArrayRecord: the same records in the same order.

tfds has a converter of its own (`tfds convert_format`); it needs Beam even where it does not run
it, keeps nothing of a shard that was interrupted, and leaves the class names behind.
"""

import functools
import hashlib
import re
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, file_adapters
from tensorflow_datasets.core.proto import dataset_info_pb2

from supmim_jax.data import source as source_module
from supmim_jax.data.prepare import shards
from supmim_jax.errors import SetupError

INFO = "dataset_info.json"


def prepare(source: epath.Path, data_dir: str, dry_run: bool = False) -> str:
    """Writes the data set, going on where an earlier run stopped; what to say at the end.

    A source shard becomes one shard, or several of shards.RECORDS_PER_SHARD records.

    Args:
      source: <data_dir>/<name>/[<config>/]<version> of a data set that tfds wrote as TFRecord.
      data_dir: of tfds, another one than the source's; "" is its default.
      dry_run: writes nothing and says what would be.

    Raises:
      SetupError: the source is not complete, a record of it is damaged, or the disk is too small.
    """
    source = source.expanduser()
    proto = _read_info(source)
    full_name = f"{proto.name}/{proto.config_name}" if proto.config_name else proto.name
    final = shards.data_dir(data_dir) / full_name / proto.version
    if final.exists() and final.resolve() == source.resolve():
        raise SetupError(
            f"{source} is where the ArrayRecord copy would go. Give another --data_dir; the copy "
            f"is written to <data_dir>/{full_name}/{proto.version}."
        )
    features = tfds.features.FeaturesDict.from_config(source)
    source_module.check_image(features, full_name)
    jobs = _jobs(source, proto)
    made_of = {"source": str(source), "fingerprint": _fingerprint(source, jobs)}
    if not shards.is_done(final, made_of):
        needed = shards.missing_bytes(final, jobs, made_of["fingerprint"])
        if dry_run:
            return shards.planned(final, shards.splits_of(jobs), needed, features)
        shards.check_space(final, needed)
        with shards.writing(final, made_of) as directory:
            shards.write_all(directory, [job for of in jobs.values() for job in of])
            _write_info(source, directory, proto, jobs)
        done = "Converted"
    else:
        done = "Converted already"
    return shards.finished(tfds.builder_from_directory(final), full_name, data_dir, done)


def _read_info(source: epath.Path) -> dataset_info_pb2.DatasetInfo:
    """Of a data set that can be converted."""
    if not (source / INFO).exists():
        levels = ("*", "*/*", "*/*/*") if source.is_dir() else ()
        below = [path for level in levels for path in source.glob(f"{level}/{INFO}")][:5]
        hint = ", ".join(str(path.parent) for path in below) or "none below it either"
        raise SetupError(
            f"--from_tfrecord {source} has no {INFO}. Give the directory of one version, such as "
            f"~/tensorflow_datasets/imagenet2012/5.1.0 (found: {hint})."
        )
    try:
        proto = dataset_info.read_proto_from_builder_dir(source)
    except Exception as error:  # tfds wraps what json and protobuf raise in many ways
        raise SetupError(
            f"{source / INFO} cannot be read: {str(error)[:300]}. Prepare the data set again."
        ) from None
    found = proto.file_format or "tfrecord"  # what tfds wrote before it had a choice
    if found != "tfrecord":
        raise SetupError(f"{source} holds {found}, expected tfrecord; nothing to convert.")
    if not (source / "features.json").exists():
        raise SetupError(
            f"{source} has no features.json: it is of tfds 3 or older. Prepare it anew with --name "
            f"{proto.name}."
        )
    _check_names(proto, source)
    return proto


def _check_names(proto: dataset_info_pb2.DatasetInfo, source: epath.Path) -> None:
    """Raises SetupError unless what becomes part of paths to write stays below --data_dir."""
    names = {"name": proto.name, "configName": proto.config_name, "version": proto.version}
    names |= {f"splits[{i}].name": split.name for i, split in enumerate(proto.splits)}
    for field, name in names.items():
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII) and (name or field != "configName"):
            raise SetupError(
                f"{source / INFO}: {field} is {name!r}, expected letters, digits, '_', '.', '+' "
                f"and '-': it becomes part of a path. Prepare the data set again."
            )


def _jobs(source: epath.Path, proto: dataset_info_pb2.DatasetInfo) -> dict[str, list[shards.Job]]:
    """The shards to write, of each split.

    Raises:
      SetupError: files of the source are missing.
    """
    splits = dataset_info.get_split_dict_from_proto(proto, source, "tfrecord")
    jobs: dict[str, list[shards.Job]] = {}
    sizes = {path.name: path.stat().length for path in source.iterdir()}
    paths = [path for split in splits.values() for path in split.filepaths]
    if outside := [path for path in paths if path.parent != source]:
        raise SetupError(f"{source / INFO} names {outside[0]}, which is outside {source}.")
    wanted = [path.name for path in paths]
    missing = [name for name in wanted if name not in sizes]
    if missing:
        raise SetupError(
            f"{source} lacks {len(missing)} of {len(wanted)} files that its {INFO} names:"
            f"{shards.named(missing)}\nCopy them there, or prepare the data set again."
        )
    for split in splits.values():
        parts = [
            (path, range(start, min(start + shards.RECORDS_PER_SHARD, length)), length)
            for path, length in zip(split.filepaths, split.shard_lengths)
            for start in range(0, max(length, 1), shards.RECORDS_PER_SHARD)
        ]
        template = split.filename_template.replace(filetype_suffix="array_record")
        jobs[split.name] = [
            shards.Job(
                template.sharded_filepath(shard_index=i, num_shards=len(parts)).name,
                len(part),
                sizes[path.name] * len(part) // max(length, 1),
                functools.partial(_records, path, part, length),
            )
            for i, (path, part, length) in enumerate(parts)
        ]
    return jobs


def _records(path: epath.Path, part: range, length: int) -> Iterator[bytes]:
    """The records of a part of a TFRecord file, whose checksums TensorFlow verifies.

    Raises:
      SetupError: a record is damaged, or the file has not `length` records.
    """
    import tensorflow as tf

    number = 0
    try:
        for record in tf.data.TFRecordDataset(str(path), buffer_size=2**23).as_numpy_iterator():
            if number in part:
                yield record
            number += 1
            if number == part.stop < length:
                return
    except tf.errors.OpError as error:
        raise SetupError(
            f"{path}: record {number} is damaged or cut ({error.message[:200]}). The records "
            f"before it are sound. Copy the file again from where it came, then run the same "
            f"command: it goes on with this shard."
        ) from None
    if number != length:
        raise SetupError(
            f"{path} has {number} records, and {path.parent / INFO} says {length}. Copy the file "
            f"again from where it came."
        )


def _write_info(source: epath.Path, directory: epath.Path, proto, jobs: dict) -> None:
    """The source's metadata files, class names among them, and its info with the new shards."""
    for path in source.iterdir():
        own = path.name in (INFO, shards.MANIFEST) or file_adapters.is_example_file(path.name)
        if not own and path.is_file():
            path.copy(directory / path.name, overwrite=True)
    changed = dataset_info_pb2.DatasetInfo()
    changed.CopyFrom(proto)
    changed.file_format = "array_record"
    del changed.alternative_file_formats[:]
    for split in changed.splits:
        split.shard_lengths[:] = [job.records for job in jobs[split.name]]
    dataset_info.write_dataset_info_proto(changed, directory)


def _fingerprint(source: epath.Path, jobs: dict[str, list[shards.Job]]) -> str:
    """SHA-256 of the source's info, and of the name, records and bytes of every shard to write."""
    digest = hashlib.sha256((source / INFO).read_bytes() + shards.WRITER.encode())
    for of in jobs.values():
        for job in of:
            digest.update(f"{job.file}\0{job.records}\0{job.bytes}\n".encode())
    return digest.hexdigest()
