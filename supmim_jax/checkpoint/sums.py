"""SHA256SUMS: which files a checkpoint has, and their hashes, as `sha256sum -c` reads them.

It is written into the temporary directory of a save, so that one rename (on gs://, one file)
commits it with all that it lists.
"""

import asyncio
import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor

import orbax.checkpoint as ocp
from etils import epath

from supmim_jax import storage

NAME = "SHA256SUMS"
# orbax writes these after the sums, as it commits. Nothing here reads what they hold.
VOLATILE = ("_CHECKPOINT_METADATA", "commit_success.txt")
CHUNK = 1 << 22  # bytes read at once
THREADS = 4  # hashing and reading both let the others run
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


def write(directory: epath.Path) -> None:
    """Lists every file of a checkpoint but the volatile ones, by its name.

    Reads all of it again, by this one process: seconds per GB at what the storage and one to four
    cores give, in the background of training. Each file is on the disk (fsync) before it is listed,
    and so before the commit: what a power failure leaves is whole, or is seen to be damaged.
    """
    paths = {name: path for name, path in files(directory).items() if name not in VOLATILE}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = pool.map(lambda path: digest(path, sync=storage.is_local(path)), paths.values())
        lines = [f"{digest}  {name}\n" for name, digest in zip(paths, hashes)]
    storage.write(directory / NAME, "".join(lines))


def read(directory: epath.Path) -> dict[str, str]:
    """Hashes by file name.

    Raises:
      OSError: it is not there, or cannot be read.
      ValueError: it is not what `write` writes; says which line.
    """
    found = {}
    for number, line in enumerate((directory / NAME).read_bytes().decode().splitlines(), 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in found:
            raise ValueError(f"line {number} is no hash and name of a file")
        found[match[2]] = match[1]
    if not found:
        raise ValueError("it is empty")
    return found


def files(directory: epath.Path) -> dict[str, epath.Path]:
    """All files below by their names, with forward slashes, in order; not SHA256SUMS itself."""
    found = storage.files(directory)
    found.pop(NAME, None)
    return found


def digest(path: epath.Path, sync: bool = False) -> str:
    """SHA-256 of a file in chunks; with `sync`, of one that has reached the disk."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            found.update(chunk)
    return found.hexdigest()


class Summed:
    """Adds the sums as the directory of a step is committed.

    orbax commits the items inside in the same way, each before; they are files of the step. It does
    so in one process, after all processes have written.
    """

    async def finalize(self) -> None:
        """Writes the sums, then commits."""
        if self.get_final().name.isdigit():
            await asyncio.to_thread(write, self.get())
        await super().finalize()


class SummedRename(Summed, ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Committed by the rename of a directory."""


class SummedCommitFile(Summed, ocp.path.atomicity.CommitFileTemporaryPath):
    """Committed by a file that says so, where directories cannot be renamed at once."""


SUMMED = {
    ocp.path.atomicity.AtomicRenameTemporaryPath: SummedRename,
    ocp.path.atomicity.CommitFileTemporaryPath: SummedCommitFile,
}


def temporary_path_class(root: epath.Path) -> type:
    """How a checkpoint below `root` is committed: as orbax would, with the sums."""
    return SUMMED[ocp.path.atomicity_defaults.get_default_temporary_path_class(root)]
