"""SIGTERM, Ctrl-C, SIGHUP: how a command ends when its machine or terminal is wanted back.

Steps that no checkpoint holds are saved first, see `told_to_stop`. At any other moment (start-up,
compilation, evaluation, a command that keeps its work in complete files) there is nothing to lose,
and the process ends at once, from a thread: Python alone would run a signal's handler only when the
compilation or collective that the main thread is in returns.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jax.experimental import multihost_utils

from supmim_jax import distributed
from supmim_jax.config import SetupError

EXIT_SETUP = 2  # the config, data, workdir or checkpoint must be changed first
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TWICE = 0.5  # seconds: a wrapper that passes Ctrl-C on sends it again at once; no person does


class _Unsaved:
    """Held while there are steps that no checkpoint holds."""

    def __init__(self):
        self.lock, self.held = threading.Lock(), False  # the main thread alone sets `held`
        self.finish: Callable[[], None] | None = None  # what must end before the process may


_told, _unsaved = threading.Event(), _Unsaved()
_first: list[int] = []  # the signal that came first, if one came to this process


def listen() -> None:
    """From now on SIGNALS end this process as described above. Only the main thread may call.

    Several processes that have joined learn of it from JAX's preemption service instead, all of
    them, whichever was sent the signal. What nohup, or a shell for its background jobs, has this
    process ignore stays ignored.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in SIGNALS:
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_wait, args=(read,), name="preemption", daemon=True).start()
    distributed.on_preemption(end)


def stopped() -> tuple[str, int]:
    """What a run that was told to stop says at its end, and its exit code, as a shell reports it.

    Of several processes those that were not sent the signal themselves name SIGTERM.
    """
    number = _first[0] if _first else signal.SIGTERM
    said = f"Stopped by {signal.Signals(number).name}; nothing that was done is lost."
    return f"{said} The same command goes on.", 128 + number


def told_to_stop(step: int) -> bool:
    """Whether the run must save after this step and end; the same on all processes.

    All must call it after every step.
    """
    if distributed.active():
        return multihost_utils.reached_preemption_sync_point(step)
    return _told.is_set()


def hold() -> None:
    """A step was done that no checkpoint holds: a signal waits until `release`. May be repeated.

    If the process was told to end while nothing was held, this does not return.
    """
    if not _unsaved.held:
        _unsaved.lock.acquire()
        _unsaved.held = True


def release() -> None:
    """Everything is saved: a signal that waits ends the process now."""
    if _unsaved.held:
        _unsaved.held = False
        _unsaved.lock.release()


@contextlib.contextmanager
def released(finish: Callable[[], None]) -> Iterator[None]:
    """Inside, all steps are saved once `finish` has returned; a signal calls it, then ends."""
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
        distributed.leave(*stopped())


def _wait(read: int) -> None:
    """Acts on the signals that come through the pipe."""
    since = 0.0
    while True:
        for number in os.read(read, 64):
            if number not in SIGNALS:
                continue
            if not _first:
                _first.append(number)
                since = time.monotonic()
            elif number == signal.SIGINT and time.monotonic() - since > TWICE:
                _end_at_once()
            if number != signal.SIGTERM and distributed.active():
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX's service tells to all
                continue
            if number == signal.SIGINT and _unsaved.held and not _told.is_set():
                print("\nSaving the step under way; Ctrl-C again ends at once.", file=sys.stderr)
            threading.Thread(target=end, daemon=True).start()


def _end_at_once() -> None:
    """A second Ctrl-C: whoever presses it will not wait."""
    for child in multiprocessing.active_children():
        child.kill()
    print("\nerror: Ended at once; steps since the newest checkpoint are lost.", file=sys.stderr)
    os._exit(128 + signal.SIGINT)
