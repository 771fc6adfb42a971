"""The image files below a directory, and whether they are images."""

import errno
import hashlib
import os
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from etils import epath

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data import header
from supmim_jax.data.decode import Shown, Unclear, nobody_said, pixels
from supmim_jax.data.prepare import progress, shards

# All that OpenCV decodes and header.py knows; what a file is, its first bytes say.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
BEGINNING = 2**12  # bytes, where files are not decoded
# What the system says of a file, and not of a disk or of this process.
OF_THE_FILE = (
    *(errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG),
)


@dataclass(frozen=True, slots=True)
class File:
    """An image file of a folder."""

    name: str  # its path relative to the folder, with forward slashes
    label: int
    size: int  # bytes
    changed: int  # seconds since 1970
    wrong: str = ""  # what keeps it from being read, as far as its directory tells


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


@dataclass(frozen=True)
class Tree:
    """A folder that is looked through, and what is in it that is no image by its ending."""

    root: epath.Path
    follow_links: bool = False  # also those that lead out of it
    others: list[str] = field(default_factory=list)

    def entries(self, directory: epath.Path) -> list[epath.Path]:
        """What is in a directory, sorted by name; hidden files are left out.

        Raises:
          SetupError: a name cannot be stored, or a symbolic link leaves the folder or leads up.
        """
        found = sorted(
            (path for path in directory.iterdir() if not path.name.startswith(".")),
            key=lambda path: path.name,
        )
        for path in found:
            _check_characters(path.name, f"A file or directory in {directory}")
            self.check_link(path)
        return found

    def check_link(self, path: epath.Path) -> None:
        """Raises SetupError if it is a symbolic link that leaves the folder or leads up.

        One that leads nowhere is no such link, but a broken file.
        """
        if not storage.is_local(path) or not os.path.islink(path) or not os.path.exists(path):
            return
        end, top = os.path.realpath(path), os.path.realpath(self.root)
        if os.path.commonpath([end, os.path.realpath(path.parent)]) == end:
            raise SetupError(
                f"{path} is a symbolic link to {end}, a directory above it. Remove that link."
            )
        if os.path.commonpath([end, top]) != top and not self.follow_links:
            raise SetupError(
                f"{path} is a symbolic link to {end}, which is outside {self.root}. If what is "
                f"there belongs to the data set, give --follow_links; else put the files "
                f"themselves there, or give the directory that they are in."
            )

    def images(
        self, directory: epath.Path, label: int, above: tuple[str, ...] = ()
    ) -> Iterator[File]:
        """The image files below a directory, sorted by path; names of all others go to `others`.

        Args:
          directory: where to look.
          label: of what is there.
          above: real paths of the directories that lead to it.

        Raises:
          SetupError: as `entries`, or links lead in a circle.
        """
        here = os.path.realpath(directory) if storage.is_local(directory) else str(directory)
        if here in above:
            raise SetupError(f"{directory} is {here} again: links lead in a circle. Remove one.")
        for path in self.entries(directory):
            name = path.relative_to(self.root).as_posix()
            is_directory, size, changed, wrong = _look(path)
            if is_directory:
                yield from self.images(path, label, (*above, here))
            elif name.lower().endswith(ENDINGS):
                yield File(name, label, size, changed, wrong)
            else:
                self.others.append(name)


def _look(path: epath.Path) -> tuple[bool, int, int, str]:
    """Whether it is a directory, its bytes, when it was changed, and what is wrong with it."""
    if not storage.is_local(path):
        found = path.stat()
        return found.is_directory, found.length, int(found.mtime), ""
    try:
        status = os.stat(path)
    except OSError as error:
        return False, 0, 0, _refused(path, error)
    kind = status.st_mode
    if stat.S_ISDIR(kind) or stat.S_ISREG(kind):
        return stat.S_ISDIR(kind), status.st_size, int(status.st_mtime), ""
    return False, 0, 0, "is neither a file nor a directory, but a pipe, socket or device"


def _refused(path: epath.Path, error: OSError) -> str:
    """What the system says of a file; an error of the disk or of this process is raised again."""
    if error.errno not in OF_THE_FILE:
        raise error
    if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) and os.path.islink(path):
        wrong = "leads in a circle" if error.errno == errno.ELOOP else "is not there"
        return f"is a symbolic link to {os.readlink(path)}, which {wrong}"
    return f"cannot be read: {error.strerror or error}"


def fault(path: epath.Path, decode: bool, shown: Shown) -> str:
    """What keeps a file from being an image; "" for nothing. Without `decode`, its first bytes.

    Raises:
      Unclear: as `decode.pixels`.
    """
    try:
        if decode:
            encoded = path.read_bytes()
        else:
            with path.open("rb") as file:
                encoded = file.read(BEGINNING)
    except OSError as error:
        return _refused(path, error)
    if not header.kind(encoded):
        return header.fault(encoded)
    if decode:
        return "" if pixels(encoded, 3, shown) is not None else header.fault(encoded)
    found = header.read(encoded)
    if found and found.bits > 8 and not found.white and not shown.max_value:
        raise nobody_said(f"has values of {found.bits} bits", shown)
    return ""


def faults(
    root: epath.Path, files: Sequence[File], decode: bool, shown: Shown
) -> tuple[dict[str, str], dict[str, Unclear]]:
    """What is wrong with which file, by name, and what is unclear about which."""

    def one(file: File) -> str | Unclear:
        try:
            return file.wrong or fault(root / file.name, decode, shown)
        except Unclear as error:
            return error

    with progress.bar("checking", len(files), "files") as bar:
        found = dict(
            zip(
                (file.name for file in files),
                progress.counted(shards.ahead(one, files), bar),
                strict=True,
            )
        )
    unclear = {name: wrong for name, wrong in found.items() if isinstance(wrong, Unclear)}
    return {name: wrong for name, wrong in found.items() if wrong and name not in unclear}, unclear


def fingerprint(splits: dict[str, list[File]], *options: object) -> str:
    """SHA-256 of every file's split, name, label, size and time, and of the options."""
    digest = hashlib.sha256(repr(options).encode())
    for split, files in splits.items():
        for file in files:
            row = f"{split}\0{file.name}\0{file.label}\0{file.size}\0{file.changed}\n"
            digest.update(row.encode())
    return digest.hexdigest()
