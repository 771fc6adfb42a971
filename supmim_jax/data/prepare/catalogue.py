"""Makes a data set of tfds's catalogue as ArrayRecord, with its own builder.

ImageNet's official archives are checked first, before hours are spent on them: tfds's imagenet2012
only warns about a missing archive and leaves out its split, and it notices a truncated one at the
end. https://image-net.org gives the archives to those who register.
"""

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
from supmim_jax.data import emoji_designs, fractals, source
from supmim_jax.data.prepare import output
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
    classes: int = 0  # archives in it, one for each; 0: images


TRAIN = Archive(
    split="train",
    examples=1_281_167,
    file="ILSVRC2012_img_train.tar",
    size=147_897_477_120,
    md5="1d675b47d978889d74fa0da5fadfb00e",
    member=r"n\d{8}\.tar",
    classes=1000,
)
VALIDATION = Archive(
    split="validation",
    examples=50_000,
    file="ILSVRC2012_img_val.tar",
    size=6_744_924_160,
    md5="29b22e2961454d5413ddabcf34fc5622",
    member=r"ILSVRC2012_val_\d{8}\.JPEG",
)
ARCHIVES = (TRAIN, VALIDATION)
OURS = (emoji_designs.EmojiDesigns,)  # builders that tfds knows by name once they are imported


class ShardSizes(shard_utils.ShardConfig):
    """Ours; tfds's own would put up to a gigabyte of small records in one."""

    def get_number_shards(self, total_size: int, num_examples: int, *_, **__) -> int:
        by_bytes = -(-total_size // output.BYTES_PER_SHARD)
        return max(1, by_bytes, -(-num_examples // output.RECORDS_PER_SHARD))


class DownloadConfig(tfds.download.DownloadConfig):
    def get_shard_config(self) -> ShardSizes:
        return ShardSizes()


def prepare(
    name: str, data_dir: str, manual_dir: str, verify: bool = False, dry_run: bool = False
) -> str:
    """Downloads and writes the data set; returns the final message.

    A builder of tfds begins anew after an interruption, but for its downloads; what it had written
    is in a directory that begins with "incomplete.", which nothing opens. What a bucket is to hold
    is made below TMPDIR first. The arguments are the command's flags.

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
    if output.is_there(final):
        stored = builder.info.file_format.value
        if stored != "array_record":
            raise SetupError(
                f"{final} holds {name} as {stored}, which has no random access. Convert it: "
                f"{source.PREPARE} --from_tfrecord {final} --data_dir <another directory>; that "
                f"needs no download."
            )
        return output.report(builder, name, data_dir, "Prepared already")
    root = output.root(data_dir)
    local = root if storage.is_local(root) else epath.Path(tempfile.gettempdir())
    manual = epath.Path(manual_dir or local / "downloads" / "manual")
    rows = []
    if builder.name == "imagenet2012":
        check_archives(manual, verify)
        shards = ShardSizes().get_number_shards
        rows = [
            output.split_row(a.split, a.examples, a.size, shards(a.size, a.examples))
            for a in ARCHIVES
        ]
        needed = 2 * sum(a.size for a in ARCHIVES)  # tfds sorts records in files of its own
    else:
        wanted = builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        if wanted and not (manual.is_dir() and any(manual.iterdir())):
            lines = [line.strip() for line in wanted.strip().splitlines()]
            raise SetupError(
                f"{builder.name} is made of files that cannot be downloaded, and {manual} has "
                f"none. Put them there, or give --manual_dir. tfds says:\n  " + "\n  ".join(lines)
            )
        needed = 2 * int(builder.info.dataset_size) + int(builder.info.download_size or 0) or None
    if dry_run:
        return output.plan(final, rows, needed, builder.info.features)
    # Before hours are spent; where nobody knows the size, tfds fails when the disk is full.
    storage.check_disk_space(local, needed or 0, name, output.MAKE_ROOM)
    if local == root:
        _build(builder, name, root, manual)
        source.write_checksums(final)
    else:  # tfds writes ArrayRecord to local disks alone
        storage.make_directory(final)
        with tempfile.TemporaryDirectory(prefix="supmim_jax_") as temporary:
            made = _builder(name, temporary)
            _build(made, name, local, manual)
            source.write_checksums(epath.Path(made.data_path))
            storage.upload_all(epath.Path(made.data_path), final, last=output.INFO)
        builder = _builder(name, data_dir)
    return output.report(builder, name, data_dir, "Prepared")


def _builder(name: str, data_dir: str) -> tfds.core.DatasetBuilder:
    source.check_name(name, "--name")
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError:
        short = re.split("[/:]", name)[0]
        known = tfds.list_builders(with_community_datasets=False)
        near = ", ".join(difflib.get_close_matches(short, known)) or "nothing"
        raise SetupError(
            f"--name {name}: tfds {tfds.__version__} has no such data set. Near it: {near}. From "
            f"images in train/<class>/ directories (of ImageNet-21k, unpack each class's archive "
            f"to train/<wnid>/) it can be made: {source.PREPARE} --image_folder <dir> --as {short} "
            f"--val_fraction=0.01. Then train with --config.data.train_split=train "
            f"--config.data.eval_split=validation."
        ) from None
    except (ValueError, KeyError, OSError, AssertionError) as error:
        raise SetupError(f"--name {name} cannot be opened by tfds: {str(error)[:500]}") from None


def _build(
    builder: tfds.core.DatasetBuilder, name: str, root: epath.Path, manual: epath.Path
) -> None:
    """Downloads and writes it where the builder's data_path is."""
    left = list(epath.Path(builder.data_path).parent.glob("incomplete.*"))
    if left:
        output.say(
            f"Of earlier runs, {', '.join(map(str, left))}: remove what no process writes to. A "
            f"data set of tfds's catalogue begins anew."
        )
    config = DownloadConfig(
        manual_dir=manual if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None,
        try_download_gcs=False,  # that copy is TFRecord
    )
    try:
        builder.download_and_prepare(
            download_dir=root / "downloads", download_config=config, file_format="array_record"
        )
    # An AssertionError is what tfds raises where manual files are missing.
    except (AssertionError, OSError, tfds.download.DownloadError) as error:
        raise SetupError(f"tfds could not make {name}: {str(error)[:1000]}") from None


def check_archives(manual_dir: epath.Path, verify: bool) -> None:
    """Checks the size and first headers of both archives; with `verify` their MD5.

    Raises:
      SetupError: an archive is missing or another one; all faults are named.
    """
    faults = [_fault(manual_dir / archive.file, archive, verify) for archive in ARCHIVES]
    rows = [f"{archive.file}: {fault}" for archive, fault in zip(ARCHIVES, faults) if fault]
    if rows:
        raise SetupError(
            f"ImageNet's archives are not in order in {manual_dir}:{output.listed(rows)}\nGet them "
            f"from https://image-net.org/download-images (after registration: ILSVRC2012, Training "
            f"images (Task 1 & 2) and Validation images (all tasks)) and put them there as they "
            f"are, or name their directory with --manual_dir."
        )


def _fault(path: epath.Path, archive: Archive, verify: bool) -> str:
    """What is wrong with an archive; "" for nothing."""
    if not path.exists():
        return f"missing, expected {archive.size:,} bytes"
    size = storage.stat(path).size
    if size != archive.size:
        state = "cut, or still being copied" if size < archive.size else "not the official file"
        return f"has {size:,} bytes, expected {archive.size:,}: {state}"
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            fault = _fault_inside(tar, archive)
    except (tarfile.TarError, OSError, EOFError, KeyError) as error:
        fault = f"is no readable tar archive ({error})"
    if fault or not verify:
        return fault
    digest = hashlib.md5(usedforsecurity=False)
    with output.progress(f"MD5 of {path.name}", size, "B") as bar, path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    md5 = digest.hexdigest()
    return "" if md5 == archive.md5 else f"has the MD5 {md5}, expected {archive.md5}"


def _fault_inside(tar: tarfile.TarFile, archive: Archive) -> str:
    """What the headers say; of the images only the first one's first bytes are read.

    The archive of the training images holds one per class, so that its headers are few, and all
    are read. The other's would be a seek per image: the first has to do.
    """
    first = tar.next()
    if first is None:
        return "is an archive without files"
    members = tar.getmembers() if archive.classes else [first]
    for member in members:
        if not member.isfile() or not re.fullmatch(archive.member, member.name):
            return f"holds {member.name!r}, expected plain files with names as {archive.member}"
    if archive.classes and len(members) != archive.classes:
        return f"holds {len(members)} archives, expected {archive.classes}"
    content = tar.extractfile(first)
    if archive.classes:
        with tarfile.open(fileobj=content, mode="r:") as of_class:
            image = of_class.next()
            start = of_class.extractfile(image).read(3) if image and image.isfile() else b""
    else:
        start = content.read(3)
    if start != JPEG:
        return f"holds {first.name}, which begins with {start.hex(' ')} and not with a JPEG image"
    return ""
