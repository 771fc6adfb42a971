"""Ends a run that makes no more steps: a dead file system, a hung collective, a lost device."""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from supmim_jax import multihost
from supmim_jax.config import WatchConfig

FIRST = 5  # intervals before their median is trusted
RECENT = 101  # intervals that it is of
LOOK = 0.5  # seconds between looks


class Watchdog:
    """Looks from a thread whether steps go on; a context, of which one is open at a time.

    A process whose last step is longer ago than config.watch allows dumps the stacks of all its
    threads to stderr, says which process is behind, and ends with EXIT_TRY_AGAIN; so do the
    others. Before the median of a step's time is known, and in pauses, nothing is called a stall.
    Time in which the watch itself did not run counts for nothing: the whole process stood still, by
    Ctrl-Z, docker pause, Slurm's suspend or a closed lid, and goes on where it was.
    """

    def __init__(self, cfg: WatchConfig):
        self.cfg = cfg
        self.intervals: collections.deque[float] = collections.deque(maxlen=RECENT)
        self.last: float | None = None  # None in a pause
        self.step, self.ending = 0, threading.Event()
        self.lock = threading.Lock()

    def __enter__(self) -> "Watchdog":
        if self.cfg.stall_factor:
            threading.Thread(target=self._look, name="stall", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ending.set()

    def beat(self, step: int) -> None:
        """A step was dispatched; with a device's short queue, one was done not long ago."""
        now = time.monotonic()
        with self.lock:
            if self.last is not None:
                self.intervals.append(now - self.last)
            self.last, self.step = now, step
        multihost.reached(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The time inside belongs to no step."""
        with self.lock:
            self.last = None
        yield
        with self.lock:
            self.last = time.monotonic()

    def limit(self) -> float | None:
        """Seconds without a step that are a stall; None while it cannot be known."""
        if len(self.intervals) < FIRST:
            return None
        return max(
            self.cfg.stall_seconds, self.cfg.stall_factor * statistics.median(self.intervals)
        )

    def stalled(self) -> float | None:
        """Seconds since the last step, where that is a stall."""
        with self.lock:
            limit = self.limit()
            if limit is None or self.last is None:
                return None
            since = time.monotonic() - self.last
        return since if since > limit else None

    def _look(self) -> None:
        looked = time.monotonic()
        while not self.ending.wait(LOOK):
            now = time.monotonic()
            stood, looked = now - looked - LOOK, now
            with self.lock:
                if self.last is not None:
                    self.last = min(now, self.last + stood)
            since = self.stalled()
            if since is not None and not self.ending.is_set():
                self._give_up(since)

    def _give_up(self, since: float) -> None:
        median = statistics.median(self.intervals)
        print(f"\nNo step for {since:.0f} s; what every thread does:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        behind = multihost.behind()
        where = f" Behind all others: {behind}." if behind else ""
        multihost.leave(
            f"No step for {since:.0f} s after step {self.step}, {since / median:.0f} times their "
            f"median of {median:.2g} s.{where} The stacks of all threads are above. The same "
            f"command goes on from the newest checkpoint; config.watch.stall_factor and "
            f"stall_seconds say what is too long.",
            multihost.EXIT_TRY_AGAIN,
        )
