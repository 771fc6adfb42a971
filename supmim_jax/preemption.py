"""SIGTERM: how a command ends when its machine is wanted back.

Steps that no checkpoint holds are saved first, see `told_to_stop`. At any other moment (start-up,
compilation, evaluation, a command that keeps its work in complete files) there is nothing to lose,
and the process ends at once, from a thread: Python alone would run a signal's handler only when the
compilation or collective that the main thread is in returns.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from supmim_jax import distributed
from supmim_jax.config import SetupError

EXIT_STOPPED = 143  # 128 + SIGTERM, as a shell reports it; the same command goes on
EXIT_SETUP = 2  # the config, data, workdir or checkpoint must be changed first
MESSAGE = "Stopped by SIGTERM; nothing that was done is lost. The same command goes on."


class _Unsaved:
    """Held while there are steps that no checkpoint holds."""

    def __init__(self):
        self.lock, self.held = threading.Lock(), False  # the main thread alone sets `held`
        self.finish: Callable[[], None] | None = None  # what must end before the process may


_told, _unsaved = threading.Event(), _Unsaved()


def listen() -> None:
    """From now on SIGTERM ends this process as described above. Only the main thread may call.

    Several processes that have joined learn of it from JAX's preemption service instead, all of
    them, whichever was sent the signal.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGTERM, lambda *_: None)
    threading.Thread(target=_wait, args=(read,), name="preemption", daemon=True).start()
    distributed.on_preemption(end)


def told_to_stop(step: int) -> bool:
    """Whether the run must save after this step and end; the same on all processes.

    All must call it after every step.
    """
    if distributed.active():
        return multihost_utils.reached_preemption_sync_point(step)
    return _told.is_set()


def hold() -> None:
    """A step was done that no checkpoint holds: SIGTERM waits until `release`. May be repeated.

    If the process was told to end while nothing was held, this does not return.
    """
    if not _unsaved.held:
        _unsaved.lock.acquire()
        _unsaved.held = True


def release() -> None:
    """Everything is saved: a SIGTERM that waits ends the process now."""
    if _unsaved.held:
        _unsaved.held = False
        _unsaved.lock.release()


@contextlib.contextmanager
def released(finish: Callable[[], None]) -> Iterator[None]:
    """Inside, all steps are saved once `finish` has returned; a SIGTERM calls it, then ends."""
    _unsaved.finish = finish
    release()
    try:
        yield
        hold()  # not after an error: nothing is done then that would have to be saved
    finally:
        _unsaved.finish = None


def end() -> None:
    """Ends this process once nothing would be lost."""
    _told.set()
    with _unsaved.lock:
        try:
            if _unsaved.finish:
                _unsaved.finish()
        except SetupError as error:
            distributed.leave(str(error), EXIT_SETUP)
        except Exception as error:
            distributed.leave(f"{type(error).__name__}: {error}", distributed.EXIT_TRY_AGAIN)
        distributed.leave(MESSAGE, EXIT_STOPPED)


def _wait(read: int) -> None:
    while signal.SIGTERM not in os.read(read, 64):
        pass
    end()
