"""Ends a run that makes no progress (a dead file system, a hung collective), or only NaN."""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Iterator

import jax
import numpy as np

from supmim_jax import multihost
from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import WatchConfig

FIRST = 5  # intervals before their median is trusted
RECENT = 101  # intervals that it is of
LOOK = 0.5  # seconds between looks


class Watchdog:
    """Checks from a thread if steps are still made; a context, of which one is open at a time.

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
        """Records that a step was dispatched; a device's queue is short, so one ended recently."""
        now = time.monotonic()
        with self.lock:
            if self.last is not None:
                self.intervals.append(now - self.last)
            self.last, self.step = now, step
        multihost.reached(step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside the context belongs to no step."""
        with self.lock:
            self.last = None
        yield
        with self.lock:
            self.last = time.monotonic()

    def stalled(self) -> float | None:
        """Seconds since the last step, if they are a stall."""
        with self.lock:
            if len(self.intervals) < FIRST or self.last is None:
                return None
            limit = self.cfg.stall_factor * statistics.median(self.intervals)
            since = time.monotonic() - self.last
        return since if since > max(self.cfg.stall_seconds, limit) else None

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


class Diverged(Exception):
    """In `step`, a loss term or the gradient was no longer finite."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class NanGuard:
    """Checks each step's metrics one step late, so that the device never waits for it."""

    def __init__(self):
        self.pending: tuple[int, Metrics, jax.Array] | None = None

    def __call__(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Checks the step before and remembers this one.

        Raises:
          Diverged: a value is NaN or infinite; names the step, its terms and the ids.
        """
        self.flush()
        self.pending = (step, metrics, batch.id)

    def flush(self) -> None:
        """Checks the remembered step, so that no poisoned state is saved or reported."""
        if self.pending is None:
            return
        (step, metrics, ids), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if np.isfinite(list(values.values())).all():
            return
        local = np.concatenate([np.asarray(shard.data) for shard in ids.addressable_shards])
        raise Diverged(
            f"Step {step} is not finite: {', '.join(f'{k}={v:g}' for k, v in values.items())}. "
            f"Ids of its batch: {', '.join(map(str, np.unique(local)))}. Nothing of this step was "
            f"saved. Lower config.optim.lr or set config.optim.clip (with another --workdir), or "
            f"look at these examples. config.watch.roll_backs lets a run leave batches out.",
            step,
        )
