"""Whether ImageNet's official archives are in place, before hours are spent on them.

tfds's imagenet2012 leaves out, with a warning, a split whose archive is missing, and finds a cut
one when it reaches the end. https://image-net.org gives the archives to those who register.
"""

import hashlib
import re
import tarfile
from dataclasses import dataclass

from etils import epath

from supmim_jax.config import SetupError
from supmim_jax.data.prepare import progress

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
    with progress.bar(f"MD5 of {path.name}", size, "B") as bar, path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return digest.hexdigest()
