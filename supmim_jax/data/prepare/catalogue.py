"""A data set of tfds's catalogue, made by its own builder, as ArrayRecord."""

import difflib
import tempfile

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.utils import shard_utils

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data import fractals, metadata, records, seals
from supmim_jax.data.prepare import imagenet, progress, report, shards, target

UNPACK = (
    " For ImageNet-21k unpack each class's archive to train/<wnid>/, and train with "
    "--config.data.train_split=train --config.data.eval_split=validation."
)


class Shards(shard_utils.ShardConfig):
    """Our shard sizes; tfds's own would put up to a gigabyte of small records in one."""

    def get_number_shards(self, total_size: int, num_examples: int, *_, **__) -> int:
        by_bytes = -(-total_size // shards.BYTES_PER_SHARD)
        return max(1, by_bytes, -(-num_examples // shards.RECORDS_PER_SHARD))


class Config(tfds.download.DownloadConfig):
    def get_shard_config(self) -> Shards:
        return Shards()


def prepare(
    name: str, data_dir: str, manual_dir: str, verify: bool = False, dry_run: bool = False
) -> str:
    """Downloads and writes the data set; what to say at the end.

    A builder of tfds begins anew after an interruption, but for its downloads; what it had written
    is in a directory that begins with "incomplete.", which nothing opens. What a bucket is to hold
    is made below TMPDIR first.

    Args:
      name: as tfds knows it, <name>[/<config>][:<version>].
      data_dir: of tfds; "" is its default.
      manual_dir: of files that cannot be downloaded; "" is <data_dir>/downloads/manual (of a
        bucket: below TMPDIR).
      verify: also computes the MD5 of ImageNet's archives.
      dry_run: writes nothing and says what would be.

    Raises:
      SetupError: tfds lacks the data set, or its files, or the disk is too small.
    """
    if name.partition("/")[0] == "fractals":
        raise SetupError(
            "fractals is built in, and made when a run first opens it: nothing to prepare. Its "
            f"configs are {', '.join(fractals.SPECS)}."
        )
    builder = _builder(name, data_dir)
    records.check_image(builder.info.features, name)
    final = epath.Path(builder.data_path)
    if final.exists():
        _check_format(builder, name)
        return report.finished(builder, name, data_dir, report.AGAIN)
    root = target.data_dir(data_dir)
    local = root if storage.is_local(root) else epath.Path(tempfile.gettempdir())
    manual = epath.Path(manual_dir or local / "downloads" / "manual")
    splits: list[report.Split] = []
    if builder.name == "imagenet2012":
        imagenet.check(manual, verify)
        cut = Shards().get_number_shards
        splits = [
            report.Split(a.split, a.examples, a.size, cut(a.size, a.examples))
            for a in imagenet.ARCHIVES
        ]
        needed = 2 * sum(split.bytes for split in splits)  # tfds sorts records in files of its own
    else:
        _check_manual(builder, manual)
        needed = 2 * int(builder.info.dataset_size) + int(builder.info.download_size or 0) or None
    if dry_run:
        return report.planned(final, splits, needed, builder.info.features)
    target.check_space(local, needed or 0)
    if local == root:
        _build(builder, name, root, manual)
        seals.write(final)
    else:  # tfds writes ArrayRecord to local disks alone
        storage.make_directory(final)
        with tempfile.TemporaryDirectory(prefix="supmim_jax_") as temporary:
            made = _builder(name, temporary)
            _build(made, name, local, manual)
            seals.write(epath.Path(made.data_path))
            storage.upload_all(epath.Path(made.data_path), final, last=target.INFO)
        builder = _builder(name, data_dir)
    return report.finished(builder, name, data_dir, "Prepared")


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    metadata.check_name(name, "--name")
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        short = name.partition("/")[0].partition(":")[0]
        near = difflib.get_close_matches(
            short, tfds.list_builders(with_community_datasets=False), n=3
        )
        like = f" Near it: {', '.join(near)}." if near else ""
        unpack = UNPACK if short.startswith("imagenet21k") else ""
        raise SetupError(
            f"--name {name}: tfds {tfds.__version__} has no such data set.{like} From images in "
            f"train/<class>/ directories it can be made: {records.PREPARE} --image_folder <dir> "
            f"--as {short} --val_fraction=0.01.{unpack}"
        ) from None
    except (ValueError, KeyError, OSError, AssertionError) as error:
        raise SetupError(f"--name {name} cannot be opened by tfds: {str(error)[:500]}") from None


def _check_format(builder: tfds.core.DatasetBuilder, name: str) -> None:
    """Raises SetupError unless what is there has random access."""
    found = builder.info.file_format
    if found.value != "array_record":
        raise SetupError(
            f"{builder.data_path} holds {name} as {found.value}, which has no random access. "
            f"Convert it: {records.PREPARE} --from_tfrecord {builder.data_path} --data_dir "
            f"<another directory>; that needs no download."
        )


def _check_manual(builder: tfds.core.DatasetBuilder, manual: epath.Path) -> None:
    wanted = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
    if wanted and not (manual.is_dir() and any(manual.iterdir())):
        text = "\n".join(f"  {line.strip()}" for line in wanted.strip().splitlines())
        raise SetupError(
            f"{builder.name} is made of files that cannot be downloaded, and {manual} has none. "
            f"Put them there, or give --manual_dir. tfds says:\n{text}"
        )


def _build(
    builder: tfds.core.DatasetBuilder, name: str, root: epath.Path, manual: epath.Path
) -> None:
    final = epath.Path(builder.data_path)
    if final.parent.exists():
        left = [p for p in final.parent.iterdir() if p.name.startswith("incomplete.")]
        if left:
            progress.say(
                f"Of earlier runs, {', '.join(map(str, left))}: remove what no process writes to. "
                f"A data set of tfds's catalogue begins anew."
            )
    config = Config(
        manual_dir=manual if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None,
        try_download_gcs=False,  # that copy is TFRecord
    )
    try:
        builder.download_and_prepare(
            download_dir=root / "downloads", download_config=config, file_format="array_record"
        )
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        raise SetupError(f"tfds could not make {name}: {str(error)[:1000]}") from None
