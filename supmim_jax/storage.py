"""Where runs, data sets and caches are: directories of this machine, or of a bucket (gs://).

Every path that a user gives passes through `location`, either as a flag (`define`) or as a config
field. gcsfs reads and writes gs:// through epath, TensorStore the arrays, ArrayRecord the records.
An object appears at once with all its bytes, but a bucket has no directories, no rename and no
append. What must become visible at once is therefore committed there by a file that is written
last.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from absl import flags
from etils import epath

from supmim_jax.errors import SetupError

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
# Local directories of these names would be taken for a bucket by epath.
TAKEN_FOR_BUCKETS = re.compile(r"/(gs|s3|az|hf)(/|$)")
DENIED = (401, 403, 404)  # HTTP status codes that no other try changes
DENIAL = r"^Forbidden|Invalid Credentials|PERMISSION_DENIED|UNAUTHENTICATED"  # in their words
PATTERN = re.compile(r"[*?\[\]]")
# System errors of a moment: a disk or file server that fails, a network, memory that is short.
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ENFILE, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETDOWN, errno.ENETRESET),
    *(errno.ENETUNREACH, errno.EHOSTDOWN, errno.EHOSTUNREACH),
}
THREADS = 32  # of requests to a bucket, which mostly wait


def location(text: str | os.PathLike, searched: bool = True) -> epath.Path:
    """The absolute path that a user names: local (`~` is the home, file:// is local), or gs://.

    Args:
      text: what was given.
      searched: whether a library looks for files below it by patterns, as orbax and tfds do.

    Raises:
      SetupError: it is empty or of another kind of storage, or names no bucket, or is itself a
        pattern.
    """
    text = os.fspath(text)
    if not text:
        raise SetupError("A path is empty; the working directory is named by a dot.")
    if searched and (pattern := PATTERN.search(text)):
        raise SetupError(
            f"{text} has a {pattern[0]!r}: libraries that look for files below it would take it "
            f"for a pattern and find others, or none. Choose a path without * ? [ and ]."
        )
    if text.startswith("file:///"):
        text = text.removeprefix("file://")
    if text.startswith("gs://"):
        bucket, *parts = text.removeprefix("gs://").split("/")
        if not bucket or ".." in parts:
            raise SetupError(f"{text} is no place in a bucket; expected gs://<bucket>/<path>.")
        return epath.Path(f"gs://{bucket}", *(part for part in parts if part not in ("", ".")))
    if match := SCHEME.match(text):
        raise SetupError(
            f"{text} is on {match[1]}:, where runs and data cannot be kept. Give a local path, one "
            f"of a file system that is mounted (NFS, Lustre, s3fs, blobfuse), or gs://<bucket>/..."
        )
    found = os.path.abspath(os.path.expanduser(text))
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise SetupError(f"{text}: there is no such home directory. ./{text} is a local name.")
    if TAKEN_FOR_BUCKETS.match(found):
        raise SetupError(
            f"{text} is {found}, which the libraries that read it take for a bucket. Choose a "
            f"directory that is not below /gs, /s3, /az or /hf; a bucket is gs://<bucket>/..."
        )
    return epath.Path(found)


class PathParser(flags.ArgumentParser):
    """A flag's text to an absolute path as text; "" stays as it is where the flag may be empty."""

    syntactic_help = "a local path or gs://<bucket>/<path>"

    def __init__(self, searched: bool, may_be_empty: bool = False):
        self.searched, self.may_be_empty = searched, may_be_empty

    def parse(self, argument: str) -> str:
        try:
            empty = not argument and self.may_be_empty
            return "" if empty else str(location(argument, self.searched))
        except SetupError as error:
            raise ValueError(str(error)) from None


def define(
    name: str, default: str | None, text: str, required: bool = False, searched: bool = True
) -> flags.FlagHolder:
    """Defines a flag that takes one path; see `location`."""
    parser = PathParser(searched, may_be_empty=default == "")
    return flags.DEFINE(parser, name, default, text, required=required)


def define_multi(name: str, text: str) -> flags.FlagHolder:
    """Defines a required flag that takes a path and may be given several times."""
    return flags.DEFINE_multi(
        PathParser(True), flags.ArgumentSerializer(), name, None, text, required=True
    )


def is_local(path: str | os.PathLike) -> bool:
    """Whether the operating system can open the path, which it cannot if it is gs://."""
    return "://" not in str(path)


def make_directory(path: epath.Path) -> None:
    """Makes a directory and its parents; for gs://, checks that the bucket exists.

    Raises:
      OSError: it cannot be made.
      SetupError: there is no such bucket, or it is not to be seen with these credentials.
    """
    if is_local(path):
        path.mkdir(parents=True, exist_ok=True)
        return
    bucket = path.parts[2]
    system, root = fsspec.core.url_to_fs(f"gs://{bucket}")
    if not system.exists(root):  # gcsfs would make it, in a project of its choice
        raise SetupError(
            f"{path}: there is no bucket {bucket!r}, or these credentials may not see it. Make it "
            f"(gcloud storage buckets create gs://{bucket}) or grant roles storage.objectUser and "
            f"storage.legacyBucketReader on it."
        )


def children(directory: epath.Path) -> list[epath.Path]:
    """The entries of a directory; none if it does not exist (a bucket has no empty ones).

    Not by is_dir(): to gcsfs a directory that it may not see, or not now, is none, and a run would
    begin anew.
    """
    if is_local(directory):
        return list(directory.iterdir()) if directory.is_dir() else []
    system, root = fsspec.core.url_to_fs(str(directory))
    try:
        names = system.ls(root, detail=False)
    except FileNotFoundError:
        return []
    found = (name.rstrip("/").rpartition("/")[2] for name in names if name.rstrip("/") != root)
    return [directory / name for name in sorted(found)]


def files(directory: epath.Path) -> dict[str, epath.Path]:
    """All files below by their names, with forward slashes, in order."""
    directory = epath.Path(directory)
    if is_local(directory):
        walked = os.walk(directory)
        names = [os.path.join(root, name) for root, _, of in walked for name in of]
        names = [os.path.relpath(name, directory) for name in names]
    else:  # one request for a thousand objects, where a walk asks for each directory
        system, root = fsspec.core.url_to_fs(str(directory))
        names = [name.removeprefix(f"{root}/") for name in system.find(root)]
    return {name: directory / name for name in sorted(names)}


class Stat(NamedTuple):
    size: int  # bytes
    mtime: float  # seconds since 1970


def stat(path: epath.Path) -> Stat:
    """Size and time of a file; epath's own stat fails where the owner has no name."""
    if is_local(path):
        found = os.stat(path)
        return Stat(found.st_size, found.st_mtime)
    found = path.stat()
    return Stat(found.length, found.mtime)


def write(path: epath.Path, data: str | bytes) -> None:
    """Writes a file atomically: readers see all of it or none, also after a power failure."""
    data = data.encode() if isinstance(data, str) else data
    if not is_local(path):
        path.write_bytes(data)
        return
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: epath.Path, values: dict | list) -> None:
    """Writes JSON as `write` does; `read_json` reads it."""
    write(path, json.dumps(values, indent=1) + "\n")


@contextlib.contextmanager
def written(path: epath.Path) -> Iterator[epath.Path]:
    """A local file to write to; it moves to `path` if the context ends without an error.

    For libraries that write local files alone. What a bucket is to hold grows in TMPDIR and is
    compared, once it is there, by its MD5.
    """
    if is_local(path):
        part = path.with_name(f"{path.name}.part")
        yield part
        part.replace(path)
        return
    with tempfile.TemporaryDirectory(prefix="supmim_jax_") as directory:
        part = epath.Path(directory) / path.name
        yield part
        upload(part, path)


def upload(source: epath.Path, target: epath.Path) -> None:
    """Copies a local file into a bucket.

    Raises:
      OSError: what is there has another MD5.
    """
    from gcsfs.retry import ChecksumError

    system, name = fsspec.core.url_to_fs(str(target))
    try:
        system.put_file(str(source), name, consistency="md5")
    except ChecksumError as error:
        raise OSError(f"{target} was not stored as it was sent: {error}") from None


@contextlib.contextmanager
def made(directory: epath.Path, last: str) -> Iterator[epath.Path]:
    """A local directory to write to; it moves to `directory` if the context ends well.

    In a bucket the file of the name `last` appears after all others.
    """
    if is_local(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        part = directory.with_name(f".{directory.name}.{os.getpid()}.part")
        try:
            part.mkdir()
            yield part
            os.replace(part, directory)  # an empty directory may be there
        finally:
            part.rmtree(missing_ok=True)
        return
    make_directory(directory)
    with tempfile.TemporaryDirectory(prefix="supmim_jax_") as temporary:
        yield epath.Path(temporary)
        upload_all(epath.Path(temporary), directory, last)


def upload_all(source: epath.Path, target: epath.Path, last: str) -> None:
    """Copies a local directory into a bucket, the file `last` after all others."""
    found = files(source)
    _with_last(last, found, lambda name: upload(found[name], target / name))


def _with_last(last: str, names: Iterable[str], do: Callable[[str], None]) -> None:
    """Calls `do` with each name in threads, with `last` after all others."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(do, [name for name in names if name != last]))
    do(last)


@contextlib.contextmanager
def fetched(path: epath.Path) -> Iterator[Path]:
    """The file or directory itself, or a local copy of one in a bucket."""
    if is_local(path):
        yield Path(path)
        return
    system, name = fsspec.core.url_to_fs(str(path))
    with tempfile.TemporaryDirectory(prefix="supmim_jax_") as temporary:
        copy = Path(temporary, path.name)
        if system.exists(name):
            system.get(name, str(copy), recursive=system.isdir(name))
        yield copy


def rename(source: epath.Path, target: epath.Path, last: str) -> None:
    """Renames a complete directory: atomically, or in a bucket file by file, `last` at the end."""
    if is_local(source):
        source.rename(target)
        return
    system, there = fsspec.core.url_to_fs(str(source))
    _, here = fsspec.core.url_to_fs(str(target))
    # Within the bucket: no byte passes through this machine.
    _with_last(last, files(source), lambda x: system.cp_file(f"{there}/{x}", f"{here}/{x}"))
    source.rmtree()


def free_bytes(path: str | os.PathLike) -> int | None:
    """Free space of the disk that the path is on, or will be on; None for a bucket."""
    if not is_local(path):
        return None
    local = Path(path).absolute()
    return shutil.disk_usage(next(p for p in (local, *local.parents) if p.exists())).free


def check_disk_space(path: str | os.PathLike, needed: int, what: str, cure: str) -> None:
    """Raises SetupError unless the path's disk, if it has one, has this many bytes free.

    What a quota leaves is not known, nor of gs:// anything.

    Raises:
      SetupError: it has not; `what` needs them, and `cure` says what to do.
    """
    free = free_bytes(path)
    if free is not None and free < needed:
        raise SetupError(
            f"{path} has no room for {what}: {free} bytes ({free / 2**30:.2f} GiB) are free, and "
            f"it takes {needed} bytes ({needed / 2**30:.2f} GiB). {cure}"
        )


def read_json(path: epath.Path, cure: str) -> Any:
    """The contents of a JSON file.

    Raises:
      SetupError: it cannot be read; `cure` says what to do.
    """
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read: {error}. {cure}") from None


def may_pass(error: BaseException | None) -> bool:
    """Whether an error of a disk, server or network may be gone on another try."""
    if not isinstance(error, OSError) or isinstance(error, FileNotFoundError):
        return False
    return error.errno in PASSING if error.errno else not denied(error)


def denied(error: BaseException) -> str:
    """The message, if an error means that a bucket refuses access permanently; else ""."""
    code = getattr(error, "code", None)  # gcsfs's and google.cloud's errors of HTTP have it
    text = ": ".join(str(error).strip().splitlines()[:2])  # what was refused, and why
    refused = code in DENIED or re.search(DENIAL, str(error))
    if type(error).__name__ == "DefaultCredentialsError" or refused:
        return (
            f"The bucket refuses: {text}. Sign in (gcloud auth application-default login) or give "
            f"the machine's service account storage.objectUser and storage.legacyBucketReader."
        )
    return ""
