"""A data set of tfds's catalogue, made by its own builder, as ArrayRecord.

Whether ImageNet's official archives are in place, before hours are spent on them.

tfds's imagenet2012 leaves out, with a warning, a split whose archive is missing, and finds a cut
one when it reaches the end. https://image-net.org gives the archives to those who register."""

import difflib
import hashlib
import re
import tarfile
import tempfile
from dataclasses import dataclass

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.utils import shard_utils

from supmim_jax import storage
from supmim_jax.data import fractals, source
from supmim_jax.data.prepare import shards
from supmim_jax.errors import SetupError

JPEG = b"\xff\xd8\xff"
CHUNK = 2**24  # bytes read at once


@dataclass(frozen=True)
class Archive:
    """One of the files that tfds wants in manual_dir; sizes and sums as image-net.org has them."""

    split: str
    examples: int
    file: str
    size: int  # bytes
    md5: str
    member: str  # what every name in it matches
    members: int
    nested: bool = False  # whether a member is an archive of images, or an image


TRAIN = Archive(
    "train",
    1_281_167,
    "ILSVRC2012_img_train.tar",
    147_897_477_120,
    "1d675b47d978889d74fa0da5fadfb00e",
    r"n\d{8}\.tar",
    1000,
    nested=True,
)
VALIDATION = Archive(
    "validation",
    50_000,
    "ILSVRC2012_img_val.tar",
    6_744_924_160,
    "29b22e2961454d5413ddabcf34fc5622",
    r"ILSVRC2012_val_\d{8}\.JPEG",
    50_000,
)
ARCHIVES = (TRAIN, VALIDATION)


def check(manual_dir: epath.Path, verify: bool) -> None:
    """Looks at name, size and first headers of both archives; with `verify` at all bytes.

    Raises:
      SetupError: naming all that is wrong with either.
    """
    wrong = [(archive, _fault(manual_dir / archive.file, archive, verify)) for archive in ARCHIVES]
    rows = [f"\n  {archive.file}: {fault}" for archive, fault in wrong if fault]
    if rows:
        raise SetupError(
            f"ImageNet's archives are not in order in {manual_dir}:{''.join(rows)}\nGet them from "
            f"https://image-net.org/download-images (after registration: ILSVRC2012, Training "
            f"images (Task 1 & 2) and Validation images (all tasks)) and put them there as they "
            f"are, or name their directory with --manual_dir."
        )


def _fault(path: epath.Path, archive: Archive, verify: bool) -> str:
    """What is wrong with an archive; "" for nothing."""
    if not path.exists():
        return f"missing, expected {archive.size:,} bytes"
    size = path.stat().length
    if size != archive.size:
        state = "cut, or still being copied" if size < archive.size else "not the official file"
        return f"has {size:,} bytes, expected {archive.size:,}: {state}"
    try:
        with path.open("rb") as file:
            inside = _fault_inside(file, archive)
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        inside = f"is no readable tar archive ({error})"
    if inside or not verify:
        return inside
    found = _md5(path, size)
    return "" if found == archive.md5 else f"has the MD5 {found}, expected {archive.md5}"


def _fault_inside(file, archive: Archive) -> str:
    """What the headers say; of the images only the first one's first bytes are read.

    The archive of the training images holds one per class, so that its headers are few, and all
    are read. The other's would be a seek per image: the first has to do.
    """
    with tarfile.open(fileobj=file, mode="r:") as tar:
        first = tar.next()
        if first is None:
            return "is an archive without files"
        members = tar.getmembers() if archive.nested else [first]
        other = [m.name for m in members if not re.fullmatch(archive.member, m.name)]
        if other:
            return f"holds {other[0]!r}, expected names as {archive.member}"
        if archive.nested and len(members) != archive.members:
            return f"holds {len(members)} archives, expected {archive.members}"
        if links := [m.name for m in members if not m.isfile()]:
            return f"holds {links[0]!r}, which is no plain file"
        content = tar.extractfile(first)
        if archive.nested:
            with tarfile.open(fileobj=content, mode="r:") as of_class:
                image = of_class.next()
                start = of_class.extractfile(image).read(3) if image and image.isfile() else b""
        else:
            start = content.read(3)
    if start != JPEG:
        return f"holds {first.name}, which begins with {start.hex(' ')} and not with a JPEG image"
    return ""


def _md5(path: epath.Path, size: int) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with shards.progress_bar(f"MD5 of {path.name}", size, "B") as bar, path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()


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
    source.check_image(builder.info.features, name)
    final = epath.Path(builder.data_path)
    if final.exists():
        _check_format(builder, name)
        return shards.finished(builder, name, data_dir, shards.AGAIN)
    root = shards.data_dir(data_dir)
    local = root if storage.is_local(root) else epath.Path(tempfile.gettempdir())
    manual = epath.Path(manual_dir or local / "downloads" / "manual")
    splits: list[shards.Split] = []
    if builder.name == "imagenet2012":
        check(manual, verify)
        cut = Shards().get_number_shards
        splits = [
            shards.Split(a.split, a.examples, a.size, cut(a.size, a.examples)) for a in ARCHIVES
        ]
        needed = 2 * sum(split.bytes for split in splits)  # tfds sorts records in files of its own
    else:
        _check_manual(builder, manual)
        needed = 2 * int(builder.info.dataset_size) + int(builder.info.download_size or 0) or None
    if dry_run:
        return shards.planned(final, splits, needed, builder.info.features)
    shards.check_space(local, needed or 0)
    if local == root:
        _build(builder, name, root, manual)
        source.write_checksums(final)
    else:  # tfds writes ArrayRecord to local disks alone
        storage.make_directory(final)
        with tempfile.TemporaryDirectory(prefix="supmim_jax_") as temporary:
            made = _builder(name, temporary)
            _build(made, name, local, manual)
            source.write_checksums(epath.Path(made.data_path))
            storage.upload_all(epath.Path(made.data_path), final, last=shards.INFO)
        builder = _builder(name, data_dir)
    return shards.finished(builder, name, data_dir, "Prepared")


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    source.check_name(name, "--name")
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
            f"train/<class>/ directories it can be made: {source.PREPARE} --image_folder <dir> "
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
            f"Convert it: {source.PREPARE} --from_tfrecord {builder.data_path} --data_dir "
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
            shards.say(
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
