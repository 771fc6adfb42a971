"""Threads that read ahead, and the processes that decode images.

A spawned process first imports, as __mp_main__, the module that its parent ran as a script. With
`supmim_jax.train` that would be all of JAX, Flax and Orbax. Our workers import this module instead,
which keeps JAX out (Grain works without it), so that they are smaller and start sooner
(docs/data.md). Nothing that a worker needs imports TensorFlow. This module also ends a worker when
its parent dies, which Grain does not do if the parent was killed, and explains why a worker died.
"""

import concurrent.futures
import importlib.util
import math
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import resource_tracker
from typing import TypeVar

from supmim_jax.errors import SetupError

SHARED = "/dev/shm"  # where batches pass from a worker to its parent, as long as Linux has it
# Batches that are there at a time: of each worker one that waits and one that waits for its place;
# then those on the way to the devices, or in use, and some whose memory is about to be given back.
OF_A_WORKER, TAKEN, MARGIN = 2, 4, 1.25
PAGE = 4096  # bytes in which shared memory is given
MB = 2**20

Item, Result = TypeVar("Item"), TypeVar("Result")


def prefetched(
    make: Callable[[Item], Result],
    items: Iterable[Item],
    pool: concurrent.futures.Executor | None = None,
) -> Iterator[Result]:
    """Yields make(item) in order, from a few threads or a pool that never runs far ahead."""
    workers = os.cpu_count() or 1
    if pool is None:
        workers = min(8, workers)
        pool = concurrent.futures.ThreadPoolExecutor(workers)
    pending: deque[concurrent.futures.Future] = deque()
    try:
        for item in items:
            pending.append(pool.submit(make, item))
            if len(pending) >= 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def keep_light() -> None:
    """Makes spawned processes import this module instead of the parent's script.

    Grain starts its workers whenever it needs them, so this holds until the end.
    """
    sys.modules["__main__"].__spec__ = importlib.util.find_spec("supmim_jax.data.worker")
    # multiprocessing's own helper lives through SIGTERM and Ctrl-C; with this, through SIGHUP too.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def check_room(workers: int, size: float) -> None:
    """Raises SetupError if shared memory has no room for finished batches of `size` bytes."""
    needed = MARGIN * (OF_A_WORKER * workers + TAKEN) * size
    free, room = _room(needed)
    if needed > free:
        raise SetupError(
            f"config.data.workers is {workers}, which needs about {needed / MB:.1f} MB of shared "
            f"memory for finished batches: {room}"
        )


def _room(needed: float = 0) -> tuple[float, str]:
    """Free bytes of SHARED (infinite if it does not exist), and the same in words, with a cure."""
    try:
        status = os.statvfs(SHARED)
    except OSError:
        free, words = math.inf, f"{SHARED} is not there"
    else:
        free, total = (blocks * status.f_frsize for blocks in (status.f_bavail, status.f_blocks))
        words = f"{SHARED} has {free / MB:.1f} MB free of {total / MB:.1f} MB"
    size = math.ceil(2 * needed / 2**30) or 1
    return free, (
        f"{words}. Give a container more (docker run --shm-size={size}g, or --ipc=host; in "
        f"Kubernetes an emptyDir of medium Memory at {SHARED}), or set config.data.workers=0."
    )


def ended(error: RuntimeError) -> Exception:
    """The error to raise for one of Grain's; says why, if a worker died."""
    died = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
    if not died:
        return error
    number = -int(died[1])
    name = signal.Signals(number).name if number in set(signal.Signals) else f"exit code {-number}"
    text = f"A process that decodes images ended by {name}"
    if number == signal.SIGBUS:
        return SetupError(
            f"{text}: shared memory was full, or a file of the data set was cut while it was read. "
            f"{_room()[1]}"
        )
    if number == signal.SIGKILL:
        return ChildProcessError(
            f"{text}: mostly by the system, for want of memory (dmesg tells). The same command "
            f"goes on; fewer config.data.workers, or a larger limit of the container or job, may "
            f"help."
        )
    return ChildProcessError(f"{text}. Its output is above.")


def _end_with(parent: int) -> None:
    """Ends this process when its parent has died, perhaps without a chance to say so."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # importing it raises ImportError
    # A signal to the whole group: the parent saves first, for which it may need a batch more.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
