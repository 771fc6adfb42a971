"""Whether a checkpoint is what was committed: every file of it, and its place.

All that reads a checkpoint asks `verify` first, so wrong values are never restored silently.
"""

import itertools
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from supmim_jax import distributed, storage
from supmim_jax.checkpoint import sums
from supmim_jax.config import SetupError

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
    if distributed.active():
        topic = f"verify/{next(_calls)}"
        problem = next(filter(None, distributed.gather(topic, problem, PATIENCE)), "")
    if problem:
        _verified.pop(str(directory), None)
        raise Damaged(problem)
    known = {*sums.read(directory), *sums.VOLATILE}
    if more := [name for name in sums.files(directory) if name not in known]:
        raise SetupError(
            f"{directory} has {len(more)} files that {sums.NAME} does not list, as {more[0]}; "
            f"those that it lists are whole. Move what is not the checkpoint's away."
        )


_verified: dict[str, tuple] = {}  # the state of the files that were found right, by directory
_calls = itertools.count()


def _problem(directory: epath.Path) -> str:
    """What is wrong with this process's share; empty if nothing is."""
    try:
        listed = sums.read(directory)
    except FileNotFoundError:
        return (
            f"{directory} is damaged: {sums.NAME}, which lists its files, is missing. {ANOTHER} If "
            f"an older version of this code wrote it, which made no such file, and you trust it as "
            f"it is: cd {directory} && find * -type f ! -name {sums.NAME} -exec sha256sum {{}} + > "
            f"{sums.NAME}"
        )
    except ValueError as error:
        return f"{directory} is damaged: {sums.NAME} cannot be read ({error}). {ANOTHER}"
    state, since = _state(directory), time.time()
    if _verified.get(str(directory)) == state:
        return ""
    found = sums.files(directory)
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
    if distributed.active():
        names = names[jax.process_index() :: jax.process_count()]
    with ThreadPoolExecutor(sums.THREADS) as pool:
        hashes = dict(zip(names, pool.map(lambda name: sums.digest(found[name]), names)))
    return [
        f"{name} has {found[name].stat().length} bytes of SHA-256 {hashes[name][:16]}..., and "
        f"{sums.NAME} says {listed[name][:16]}..."
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
    for name, path in (sums.files(directory) | {sums.NAME: directory / sums.NAME}).items():
        if storage.is_local(path):
            x = os.stat(path)
            changed = max(x.st_mtime, x.st_ctime)
            found.append((name, (x.st_size, x.st_mtime_ns, x.st_ctime_ns, x.st_ino), changed))
        else:
            x = path.stat()
            found.append((name, (x.length, x.mtime), float(x.mtime)))
    return tuple(found)
