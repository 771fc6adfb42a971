"""SHA256SUMS: which files a checkpoint has and their hashes, as `sha256sum -c` reads them.

The list is written into the temporary directory of a save, so that one rename (on gs://, one file)
commits it together with the files that it lists. `verify` compares them before anything is read:
orbax restores nearly every checkpoint with a flipped bit without an error.
"""

import asyncio
import hashlib
import itertools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from supmim_jax import multihost, storage
from supmim_jax.errors import SetupError, first_few

NAME = "SHA256SUMS"
# orbax writes these after the sums, as it commits. Nothing here reads what they hold.
VOLATILE = ("_CHECKPOINT_METADATA", "commit_success.txt")
CHUNK = 1 << 22  # bytes read at once
THREADS = 4  # hashing and reading both let the others run
HIDDEN = re.compile(r"(^|/)(\.|Thumbs\.db$|desktop\.ini$)")
LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
ANOTHER = (
    "Choose another step with @step. A training run goes on from the step before with "
    "--use_older_checkpoint, which sets this one aside."
)
PATIENCE = 3600  # seconds for another process to read its share

_calls = itertools.count()  # names of exchanges between processes are used once


class Damaged(SetupError):
    """A checkpoint differs from what was saved."""


def write(directory: epath.Path) -> None:
    """Lists every file of a checkpoint but the volatile ones, by its name.

    This process alone reads all of it again, in the background of training. Each file is on the
    disk (fsync) before it is listed, and so before the commit: what a power failure leaves is
    whole, or is seen to be damaged.
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
    hashes = {}
    for number, line in enumerate((directory / NAME).read_bytes().decode().splitlines(), 1):
        match = LINE.fullmatch(line)
        if match is None or match[2] in hashes:
            raise ValueError(f"line {number} is no hash and name of a file")
        hashes[match[2]] = match[1]
    if not hashes:
        raise ValueError("it is empty")
    return hashes


def files(directory: epath.Path) -> dict[str, epath.Path]:
    """All files below by their names, with forward slashes, in order; not SHA256SUMS itself.

    Hidden ones are not the checkpoint's: macOS leaves .DS_Store and ._x, NFS .nfs0000.
    """
    names = storage.files(directory).items()
    return {name: path for name, path in names if name != NAME and not HIDDEN.search(name)}


def digest(path: epath.Path, sync: bool = False) -> str:
    """SHA-256 of a file in chunks; with `sync`, of one that has reached the disk."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        if sync:
            os.fsync(file.fileno())
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    return sha.hexdigest()


def verify(directory: epath.Path) -> None:
    """Verifies that the checkpoint is whole.

    Of several processes each reads a share of the files; all must call it alike, and all raise if
    one found damage.

    Raises:
      Damaged: SHA256SUMS or a file is missing or differs.
      SetupError: there are more files than were saved.
    """
    found = multihost.gather(f"verify/{next(_calls)}", _problem(directory), PATIENCE)
    if problem := next(filter(None, found), ""):
        raise Damaged(f"{directory} is damaged: {problem}")
    known = {*read(directory), *VOLATILE}
    if more := [name for name in files(directory) if name not in known]:
        raise SetupError(
            f"{directory} has {len(more)} files that {NAME} does not list, as {more[0]}; those "
            f"that it lists are whole. Move what is not the checkpoint's away."
        )


def _problem(directory: epath.Path) -> str:
    """What is wrong with this process's share of the files; "" if nothing is."""
    try:
        listed = read(directory)
    except FileNotFoundError:
        return (
            f"{NAME}, which lists its files, is missing. {ANOTHER} If an older version of this "
            f"code wrote it, which made no such file, and you trust it as it is: cd {directory} && "
            f"find * -type f ! -name {NAME} -exec sha256sum {{}} + > {NAME}"
        )
    except ValueError as error:
        return f"{NAME} cannot be read ({error}). {ANOTHER}"
    present = files(directory)
    problems = [f"{name} is missing" for name in listed if name not in present]
    problems = problems or _different(listed, present)
    return f"{first_few(problems)}. {ANOTHER}" if problems else ""


def _different(listed: dict[str, str], present: dict[str, epath.Path]) -> list[str]:
    """Files of this process's share that differ from the list."""
    names = sorted(listed)[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(names, pool.map(lambda name: digest(present[name]), names)))
    return [
        f"{name} has {storage.stat(present[name]).size} bytes of SHA-256 {hashes[name][:16]}..., "
        f"and {NAME} says {listed[name][:16]}..."
        for name in names
        if hashes[name] != listed[name]
    ]


def check_arrays(directory: epath.Path) -> None:
    """Checks that restoring would find every array that the save lists.

    orbax takes a save whose arrays it lost track of for a good one.

    Raises:
      SetupError: an array is missing; the save must not count.
    """
    for item in directory.iterdir():
        listing = item / "_METADATA"
        if not listing.exists():
            continue
        tree = json.loads(listing.read_text())["tree_metadata"].values()
        keys = [x["key_metadata"] for x in tree if not x["value_metadata"]["skip_deserialize"]]
        wanted = {".".join(part["key"] for part in key) for key in keys}
        where = str(item) if not storage.is_local(item) else f"file://{quote(str(item))}"
        stored = ts.KvStore.open(f"{where}/|ocdbt:").result().list().result()
        if lost := sorted(wanted - {name.decode().rpartition("/")[0] for name in stored}):
            raise SetupError(
                f"{item} was not saved whole: it lacks {len(lost)} of {len(wanted)} arrays, as "
                f"{lost[0]}. Nothing before it is lost. Choose another --workdir, then report this."
            )


class Summed:
    """Adds the checksums when the directory of a step is committed.

    orbax commits the items inside in the same way, each before; they are files of the step. It does
    so in one process, after all processes have written.
    """

    async def finalize(self) -> None:
        """Checks the arrays and writes the sums, then commits."""
        if self.get_final().name.isdigit():
            await asyncio.to_thread(check_arrays, self.get())
            await asyncio.to_thread(write, self.get())
        await super().finalize()


def temporary_path_class(root: epath.Path) -> type:
    """The class that commits checkpoints below `root`: as orbax would, plus checksums.

    That is by renaming a directory, or by writing a file where renaming is not atomic.
    """
    default = ocp.path.atomicity_defaults.get_default_temporary_path_class(root)
    return type("Summed", (Summed, default), {})
