"""Keeps JAX out of the processes that decode images, and ends them with their parent.

A spawned process first imports, under the name __mp_main__, the module that its parent ran as a
script: `supmim_jax.train`, and so all of JAX, Flax and Orbax. Here it imports this one, which bars
JAX, as Grain works without it: a worker is smaller and starts sooner (docs/data.md). TensorFlow is
not imported by anything that a worker needs. And it ends the process with its parent: Grain's
workers would outlive one that was killed.
"""

import importlib.util
import os
import signal
import sys
import threading
import time
from multiprocessing import resource_tracker

NAME = "supmim_jax.data.worker"


def keep_light() -> None:
    """From now on, processes that this one spawns import this module in place of its script.

    Grain starts its workers whenever it needs them, so this holds until the end.
    """
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(NAME)
    # multiprocessing's own helper lives through SIGTERM and Ctrl-C; with this, through SIGHUP too.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with(parent: int) -> None:
    """Ends this process when its parent has died, which may have had no time to say so."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # importing it raises ImportError
    # A signal to the whole group: the parent saves first, for which it may need a batch more.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
