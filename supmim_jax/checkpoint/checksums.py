"""SHA256SUMS: which files a checkpoint has, and their hashes, as `sha256sum -c` reads them.

It is written into the temporary directory of a save, so that one rename (on gs://, one file)
commits it with all that it lists.


Whether a checkpoint is what was committed: every file of it, and its place.

All that reads a checkpoint asks `verify` first, so wrong values are never restored silently."""

import asyncio
import hashlib
import itertools
import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import jax
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from supmim_jax import multihost, storage
from supmim_jax.errors import SetupError

NAME = "SHA256SUMS"
# orbax writes these after the sums, as it commits. Nothing here reads what they hold.
VOLATILE = ("_CHECKPOINT_METADATA", "commit_success.txt")
CHUNK = 1 << 22  # bytes read at once
THREADS = 4  # hashing and reading both let the others run
HIDDEN = re.compile(r"(^|/)(\.|Thumbs\.db$|desktop\.ini$)")
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


def check_arrays(directory: epath.Path) -> None:
    """Returns if every array that a save lists can be found as restoring finds it.

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
        found = {name.decode().rpartition("/")[0] for name in stored}
        if lost := sorted(wanted - found):
            raise SetupError(
                f"{item} was not saved whole: it lacks {len(lost)} of {len(wanted)} arrays, as "
                f"{lost[0]}. Nothing before it is lost. Choose another --workdir, then report this."
            )


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
    """All files below by their names, with forward slashes, in order; not SHA256SUMS itself.

    Hidden ones are not the checkpoint's: macOS leaves .DS_Store and ._x, NFS .nfs0000.
    """
    found = {name: path for name, path in storage.files(directory).items() if name != NAME}
    return {name: path for name, path in found.items() if not HIDDEN.search(name)}


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
        """Checks the arrays and writes the sums, then commits."""
        if self.get_final().name.isdigit():
            await asyncio.to_thread(check_arrays, self.get())
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


ANOTHER = (
    "Choose another step with @step. A training run goes on from the step before with "
    "--use_older_checkpoint, which sets this one aside."
)
SHOWN = 3  # problems
SETTLED = 2.0  # seconds: a file changed within them may change again unseen by its times
PATIENCE = 3600  # seconds for another process to read its share


class Damaged(SetupError):
    """A checkpoint is not what was saved."""


def verify(directory: epath.Path) -> None:
    """Returns if the checkpoint is whole and in its place.

    Each file is read once per command: again only if its size, times or inode changed. Of several
    processes each reads a share; all must call it alike, and all raise if one found damage.

    Raises:
      Damaged: SHA256SUMS or a file is missing or differs, or the directory has the name of another
        step.
      SetupError: there are more files than were saved.
    """
    problem = _problem(directory)
    if multihost.active():
        topic = f"verify/{next(_calls)}"
        problem = next(filter(None, multihost.gather(topic, problem, PATIENCE)), "")
    if problem:
        _verified.pop(str(directory), None)
        raise Damaged(problem)
    known = {*read(directory), *VOLATILE}
    if more := [name for name in files(directory) if name not in known]:
        raise SetupError(
            f"{directory} has {len(more)} files that {NAME} does not list, as {more[0]}; "
            f"those that it lists are whole. Move what is not the checkpoint's away."
        )


_verified: dict[str, tuple] = {}  # the state of the files that were found right, by directory
_calls = itertools.count()


def _problem(directory: epath.Path) -> str:
    """What is wrong with this process's share; empty if nothing is."""
    try:
        listed = read(directory)
    except FileNotFoundError:
        return (
            f"{directory} is damaged: {NAME}, which lists its files, is missing. {ANOTHER} If "
            f"an older version of this code wrote it, which made no such file, and you trust it as "
            f"it is: cd {directory} && find * -type f ! -name {NAME} -exec sha256sum {{}} + > "
            f"{NAME}"
        )
    except ValueError as error:
        return f"{directory} is damaged: {NAME} cannot be read ({error}). {ANOTHER}"
    state, since = _state(directory), time.time()
    if _verified.get(str(directory)) == state:
        return ""
    found = files(directory)
    problems = [f"{name} is missing" for name in listed if name not in found]
    if not problems:
        problems = _different(listed, found) or _misplaced(directory)
    if problems:
        more = f" (and {len(problems) - SHOWN} more)" if len(problems) > SHOWN else ""
        return f"{directory} is damaged: {'; '.join(problems[:SHOWN])}{more}. {ANOTHER}"
    if all(changed < since - SETTLED for _, _, changed in state):
        _verified[str(directory)] = state
    return ""


def _different(listed: dict[str, str], found: dict[str, epath.Path]) -> list[str]:
    """Files that are not those that were listed."""
    names = sorted(listed)
    if multihost.active():
        names = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(names, pool.map(lambda name: digest(found[name]), names)))
    return [
        f"{name} has {found[name].stat().length} bytes of SHA-256 {hashes[name][:16]}..., and "
        f"{NAME} says {listed[name][:16]}..."
        for name in names
        if hashes[name] != listed[name]
    ]


def _misplaced(directory: epath.Path) -> list[str]:
    """Whether the position in the data is that of the step that the directory is named by."""
    if not directory.name.isdigit():
        return []
    run = _json(directory / "run")
    position, skipped = run.get("position", 0), run.get("skipped_batches", 0)
    batch_size = _json(directory / "config").get("batch_size", 0)
    if position == (int(directory.name) + skipped) * batch_size:
        return []
    return [
        f"it was saved after {position} examples in batches of {batch_size}, of which {skipped} "
        f"were left out, not after step {directory.name}: directories were renamed"
    ]


def _json(item: epath.Path) -> dict:
    try:
        return json.loads((item / "metadata").read_text())
    except ValueError:
        return {}


def _state(directory: epath.Path) -> tuple:
    """Of each file what changes with it, and the time of its last change."""
    found = []
    for name, path in (files(directory) | {NAME: directory / NAME}).items():
        if storage.is_local(path):
            x = os.stat(path)
            changed = max(x.st_mtime, x.st_ctime)
            found.append((name, (x.st_size, x.st_mtime_ns, x.st_ctime_ns, x.st_ino), changed))
        else:
            x = path.stat()
            found.append((name, (x.length, x.mtime), float(x.mtime)))
    return tuple(found)
