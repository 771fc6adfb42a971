"""Where a data set goes: <data_dir>/<name>/<version>, which appears when it is complete.

Until then it grows in <version>.incomplete.prepare beside it, which tfds takes for no version, and
a command that was killed goes on there. The last step is one rename. A bucket has none: the objects
are copied within it, dataset_info.json after all others, and nothing opens a data set without that.
"""

import contextlib
import fcntl
import json
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.data import seals
from supmim_jax.data.prepare import progress
from supmim_jax.metrics import write_json

MANIFEST = "prepared.json"  # what the data were made of; stays beside them
UNFINISHED = ".incomplete.prepare"
LOCK = "lock"
INFO = "dataset_info.json"  # without which tfds takes a directory for no data set


def data_dir(given: str) -> epath.Path:
    """--data_dir; where it is empty, tfds's own default."""
    return storage.location(given or tfds.core.constants.DATA_DIR)


def unfinished(final: epath.Path) -> epath.Path:
    return final.with_name(final.name + UNFINISHED)


def manifest(directory: epath.Path) -> dict:
    """What prepared.json in the directory says; {} if there is none, or half of one."""
    try:
        found = json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_done(final: epath.Path, made_of: dict) -> bool:
    """Whether the data set is there and was made of this.

    Raises:
      SetupError: something else is there.
    """
    if not final.exists():
        return False
    found = manifest(final)
    if found.get("fingerprint") != made_of["fingerprint"]:
        origin = f"made of {found.get('source')}" if found else f"without {MANIFEST}"
        raise SetupError(
            f"{final} already holds a data set ({origin}), and not of {made_of['source']} as it "
            f"is now, with these options. Remove that directory, or choose another name (--as) "
            f"or --data_dir."
        )
    return True


@contextlib.contextmanager
def writing(final: epath.Path, made_of: dict) -> Iterator[epath.Path]:
    """The directory to write in; it becomes `final` if all goes well.

    Shards of an earlier run are kept if they were made of the same.

    Raises:
      SetupError: another process is writing there.
    """
    part = unfinished(final)
    storage.make_directory(part)
    with _locked(part):
        found = manifest(part)
        if found.get("fingerprint") != made_of["fingerprint"]:
            if found:
                progress.say(f"{made_of['source']} or the options changed: starting anew.")
            for path in storage.children(part):
                if path.name != LOCK:
                    path.unlink()
            write_json(part / MANIFEST, made_of)
        yield part
        for path in part.iterdir():
            if path.name == LOCK or path.name.endswith(".part"):
                path.unlink()
        seals.write(part)
        storage.rename(part, final, last=INFO)


@contextlib.contextmanager
def _locked(directory: epath.Path) -> Iterator[None]:
    """One process at a time; the system frees the lock of a process that died."""
    if not storage.is_local(directory):
        yield
        return
    with open(directory / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SetupError(
                f"Another process is writing to {directory}. Wait for it, or end it first."
            ) from None
        yield


def check_space(path: epath.Path, needed: int) -> None:
    """Raises SetupError if a local disk has fewer bytes free."""
    free = storage.free_bytes(path)
    if free is not None and needed > free:
        raise SetupError(
            f"{path} needs {progress.size(needed)}, and its disk has {progress.size(free)} free. "
            f"Free some, or choose another --data_dir (of a bucket: another TMPDIR)."
        )
