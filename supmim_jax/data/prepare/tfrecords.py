"""Copies a prepared TFRecord data set of tfds to ArrayRecord: same records, same order.

tfds's own converter (`tfds convert_format`) needs Beam even where it does not use it, keeps
nothing of an interrupted shard, and loses the class names.
"""

import functools
import hashlib
import re
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import dataset_info, file_adapters
from tensorflow_datasets.core.proto import dataset_info_pb2

from supmim_jax import storage
from supmim_jax.data.prepare import output
from supmim_jax.data.prepare.output import INFO
from supmim_jax.data.source import check_classes, check_image
from supmim_jax.errors import SetupError


def prepare(source: epath.Path, data_dir: str, dry_run: bool = False) -> str:
    """Writes the data set, continuing where an earlier run stopped; returns the final message.

    A source shard becomes one shard, or several of output.RECORDS_PER_SHARD records. The source is
    <data_dir>/<name>/[<config>/]<version> of another data_dir, as tfds wrote it.

    Raises:
      SetupError: the source is not complete, a record of it is damaged, or the disk is too small.
    """
    source = source.expanduser()
    info = _read_info(source)
    name = f"{info.name}/{info.config_name}" if info.config_name else info.name
    final = output.root(data_dir) / name / info.version
    if final.exists() and final.resolve() == source.resolve():
        raise SetupError(
            f"{source} is where the ArrayRecord copy would go. Give another --data_dir; the copy "
            f"is written to <data_dir>/{name}/{info.version}."
        )
    check_classes(source / "features.json")
    features = tfds.features.FeaturesDict.from_config(source)
    check_image(features, name)
    splits = _shards(source, info)
    digest = hashlib.sha256((source / INFO).read_bytes() + output.WRITER.encode())
    for shard in (shard for shards in splits.values() for shard in shards):
        digest.update(f"{shard.file}\0{shard.records}\0{shard.bytes}\n".encode())
    made_of = {"source": str(source), "fingerprint": digest.hexdigest()}
    done = output.is_done(final, made_of)
    if not done:
        # The source's; what is written has one format.
        del info.alternative_file_formats[:]
        others = functools.partial(_copy_others, source)
        plan = output.write(final, made_of, info, splits, features, others, dry_run)
        if dry_run:
            return plan
    builder = tfds.builder_from_directory(final)
    return output.report(builder, name, data_dir, "Converted already" if done else "Converted")


def _read_info(source: epath.Path) -> dataset_info_pb2.DatasetInfo:
    """The metadata of a data set, if it can be converted."""
    if not (source / INFO).exists():
        levels = ("*", "*/*", "*/*/*") if source.is_dir() else ()
        below = [path for level in levels for path in source.glob(f"{level}/{INFO}")][:5]
        raise SetupError(
            f"--from_tfrecord {source} has no {INFO}. Give the directory of one version, such as "
            f"~/tensorflow_datasets/imagenet2012/5.1.0 (below it: "
            f"{', '.join(str(path.parent) for path in below) or 'none'})."
        )
    try:
        info = dataset_info.read_proto_from_builder_dir(source)
    except Exception as error:  # tfds wraps what json and protobuf raise in many ways
        raise SetupError(
            f"{source / INFO} cannot be read: {str(error)[:300]}. Prepare the data set again."
        ) from None
    if info.file_format not in ("", "tfrecord"):  # "" is of a time when tfds had no choice
        raise SetupError(f"{source} holds {info.file_format}, expected tfrecord.")
    if not (source / "features.json").exists():
        raise SetupError(
            f"{source} has no features.json: it is of tfds 3 or older. Prepare it anew with --name "
            f"{info.name}."
        )
    # What becomes part of paths to write must stay below --data_dir.
    names = {"name": info.name, "version": info.version}
    names |= {"configName": info.config_name} if info.config_name else {}
    names |= {f"splits[{i}].name": split.name for i, split in enumerate(info.splits)}
    for field, name in names.items():
        if not re.fullmatch(r"\w[\w.+-]*", name, re.ASCII):
            raise SetupError(
                f"{source / INFO}: {field} is {name!r}, expected letters, digits, '_', '.', '+' "
                f"and '-': it becomes part of a path. Prepare the data set again."
            )
    return info


def _shards(
    source: epath.Path, info: dataset_info_pb2.DatasetInfo
) -> dict[str, list[output.Shard]]:
    """The shards to write, of each split.

    Raises:
      SetupError: files of the source are missing, or are not in its directory.
    """
    sizes = {path.name: storage.stat(path).size for path in source.iterdir()}
    splits = dataset_info.get_split_dict_from_proto(info, source, "tfrecord").values()
    paths = [path for split in splits for path in split.filepaths]
    if outside := [path for path in paths if path.parent != source]:
        raise SetupError(f"{source / INFO} names {outside[0]}, which is outside {source}.")
    if missing := [path.name for path in paths if path.name not in sizes]:
        raise SetupError(
            f"{source} lacks {len(missing)} of {len(paths)} files that its {INFO} names:"
            f"{output.listed(missing)}\nCopy them there, or prepare the data set again."
        )
    shards = {}
    for split in splits:
        parts = [
            (path, range(start, min(start + output.RECORDS_PER_SHARD, length)), length)
            for path, length in zip(split.filepaths, split.shard_lengths)
            for start in range(0, max(length, 1), output.RECORDS_PER_SHARD)
        ]
        template = split.filename_template.replace(filetype_suffix="array_record")
        shards[split.name] = [
            output.Shard(
                new.name,
                len(part),
                sizes[path.name] * len(part) // max(length, 1),
                functools.partial(_records, path, part, length),
            )
            for (path, part, length), new in zip(parts, template.sharded_filepaths(len(parts)))
        ]
    return shards


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
            if number == part.stop < length:  # the last part reads on, to see that no more come
                return
    except tf.errors.OpError as error:
        raise SetupError(
            f"{path}: record {number} is damaged or cut ({error.message[:200]}). Copy the file "
            f"again from where it came, then run the same command: it goes on with this shard."
        ) from None
    if number != length:
        raise SetupError(
            f"{path} has {number} records, and {path.parent / INFO} says {length}. Copy the file "
            f"again from where it came."
        )


def _copy_others(source: epath.Path, directory: epath.Path) -> None:
    """Copies the source's other metadata, class names among them."""
    for path in source.iterdir():
        own = path.name in (INFO, output.MANIFEST) or file_adapters.is_example_file(path.name)
        if not own and path.is_file():
            path.copy(directory / path.name, overwrite=True)
