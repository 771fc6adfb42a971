"""Failures of the file system in a save, told to the user."""

import contextlib
import os
import re
from collections.abc import Iterator

from etils import epath

from supmim_jax.checkpoint import places, room
from supmim_jax.config import OF_THE_USER, SetupError


@contextlib.contextmanager
def explained(what: epath.Path, done: str, workdir: epath.Path) -> Iterator[None]:
    """Explains an error of the file system that a person must fix (OF_THE_USER).

    The message says which checkpoints remain and what to do. Any other error passes unchanged: it
    may be gone on the next try.

    Args:
      what: the path being written.
      done: what was being done to it, as a past participle ("saved").
      workdir: the run's directory.

    Raises:
      SetupError: for an error that a person must fix.
    """
    try:
        yield
    except Exception as error:  # orbax and TensorStore raise many
        number = _number(error)
        if isinstance(error, SetupError) or number not in OF_THE_USER:
            raise
        raise SetupError(
            f"{what} could not be {done} ([Errno {number}] {os.strerror(number)}). "
            f"{room.state(places.steps(workdir))} See to the room and the permissions there; the "
            f"same command then goes on."
        ) from error


def _number(error: Exception) -> int | None:
    """What the system said; TensorStore has its number at the end of a long text."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None
