"""The image files below a directory, and whether they are images."""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from etils import epath

import supmim_jax
from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data.decode import pixels
from supmim_jax.data.prepare import progress, shards

ENDINGS = (".jpg", ".jpeg", ".png")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")


@dataclass(frozen=True, slots=True)
class File:
    """An image file of a folder."""

    name: str  # its path relative to the folder, with forward slashes
    label: int
    size: int  # bytes
    changed: int  # seconds since 1970


def check_name(name: str, what: str) -> str:
    """The name, if it may be that of a class.

    Raises:
      SetupError: it has a path separator, "..", a control character, a space around it, or is
      not Unicode; `what` says whose name it is.
    """
    if not name or name != name.strip() or ".." in name or set(name) & set("/\\"):
        raise SetupError(
            f"{what} is named {name!r}. The name of a class has no /, \\, '..' or space around it; "
            f"rename it."
        )
    return _check_characters(name, what)


def _check_characters(name: str, what: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") for c in name):
        raise SetupError(
            f"{what} is named {name!r}, which has control characters or is not Unicode; rename it."
        )
    return name


def entries(directory: epath.Path, root: epath.Path) -> list[epath.Path]:
    """What is in a directory, sorted by name; hidden files are left out.

    Raises:
      SetupError: a name cannot be stored, or a symbolic link leaves `root` or leads up.
    """
    found = sorted(
        (path for path in directory.iterdir() if not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    for path in found:
        _check_characters(path.name, f"A file or directory in {directory}")
        check_link(path, root)
    return found


def check_link(path: epath.Path, root: epath.Path) -> None:
    """Raises SetupError if the path is a symbolic link that leaves `root` or leads up."""
    if not storage.is_local(path) or not os.path.islink(path):
        return
    end, top = os.path.realpath(path), os.path.realpath(root)
    above = os.path.commonpath([end, os.path.realpath(path.parent)]) == end
    if os.path.commonpath([end, top]) != top or above:
        wrong = "a directory above it" if above else f"which is outside {root}"
        raise SetupError(
            f"{path} is a symbolic link to {end}, {wrong}. Put the files themselves there, or give "
            f"the directory that they are in."
        )


def images(
    directory: epath.Path, root: epath.Path, label: int, others: list[str]
) -> Iterator[File]:
    """The image files below a directory, sorted by path; names of all others go to `others`."""
    for path in entries(directory, root):
        status = path.stat()
        if status.is_directory:
            yield from images(path, root, label, others)
            continue
        name = path.relative_to(root).as_posix()
        if name.lower().endswith(ENDINGS):
            yield File(name, label, status.length, int(status.mtime))
        else:
            others.append(name)


def fault(path: epath.Path, decode: bool) -> str:
    """What keeps a file from being an image; "" for nothing. Without `decode`, its first bytes."""
    try:
        if decode:
            encoded = path.read_bytes()
        else:
            with path.open("rb") as file:
                encoded = file.read(8)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if not encoded:
        return "is empty"
    if not encoded.startswith(MAGIC):
        return f"begins with {encoded[:4].hex(' ')}, which is neither JPEG nor PNG"
    if decode and pixels(encoded, 3) is None:
        most = supmim_jax.MOST_PIXELS
        return f"cannot be decoded: it is damaged, cut, or has more than {most} pixels"
    return ""


def faults(root: epath.Path, files: Sequence[File], decode: bool) -> dict[str, str]:
    """What is wrong with which file, by name; files without a fault are left out."""
    with progress.bar("checking", len(files), "files") as bar:
        found = shards.ahead(lambda file: fault(root / file.name, decode), files)
        return {
            file.name: wrong
            for file, wrong in zip(files, progress.counted(found, bar), strict=True)
            if wrong
        }


def fingerprint(splits: dict[str, list[File]], *options: object) -> str:
    """SHA-256 of every file's split, name, label, size and time, and of the options."""
    digest = hashlib.sha256(repr(options).encode())
    for split, files in splits.items():
        for file in files:
            row = f"{split}\0{file.name}\0{file.label}\0{file.size}\0{file.changed}\n"
            digest.update(row.encode())
    return digest.hexdigest()
