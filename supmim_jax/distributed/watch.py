"""How the processes of one run fail together.

A process that fails says so by `leave`, and each of the others watches for that, as one that waits
in a collective cannot be told in any other way.
"""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax

from supmim_jax.distributed import store

EXIT_TRY_AGAIN = 1  # a process is missing or died; the same command may work the next time
PULSE = 2.0  # seconds between signs of life, and between looks at whether somebody failed
FAILED, ALIVE = f"{store.ROOT}/failed", f"{store.ROOT}/alive"
PREEMPTED = "RECEIVED_PREEMPTION_NOTICE"  # of XLA's preemption_sync_manager.cc


def on_preemption(end: Callable[[], None]) -> None:
    """`end` is called on every process, in a thread, soon after one of them was sent SIGTERM."""
    watch.on_preemption = end


def reached(step: int) -> None:
    """Notes how far this process is, for `behind`."""
    watch.step = step


def behind() -> str:
    """The processes that have reached fewer steps than others; "" for none, or where none joined.

    What they have said of themselves may be PULSE seconds old.
    """
    if not store.active():
        return ""
    try:
        said = dict(store.client().key_value_dir_get(ALIVE))
    except jax.errors.JaxRuntimeError:
        return store.name(0)  # whom nobody can ask
    steps = {int(key.rpartition("/")[2]): int(text.split()[1]) for key, text in said.items()}
    most = max(steps.values())
    late = [f"{store.name(i)} at step {n}" for i, n in sorted(steps.items()) if n < most]
    return ", ".join(store.few(late))


def begin() -> None:
    """Learns the hosts of the others and starts to watch."""
    state = store.state()
    store.client().key_value_set(f"{store.ROOT}/host/{store.me()}", socket.gethostname())
    for i in range(state.num_processes):
        store.hosts[i] = store.heard(f"{store.ROOT}/host/{i}", i)
    if store.me() == 0:  # an abort by JAX names a process by its number alone
        hosts = ", ".join(f"{i} on {host}" for i, host in store.hosts.items())
        print(f"{state.num_processes} processes: {hosts}.", file=sys.stderr, flush=True)
    watch.start()


def end() -> None:
    """Stops watching, before the processes end one after the other."""
    if store.active():
        watch.ending.set()
        watch.join()


def leave(message: str, code: int) -> None:
    """Ends this process, and soon the others, with `message` and `code`; does not return.

    Any thread may call it. Python's own exit would wait for the others at a barrier, while they may
    wait for this one. An error with EXIT_TRY_AGAIN may only follow from the end of another process:
    then that is named.
    """
    if not store.active():
        _exit(message, code)
    said = watch.failure() if code == EXIT_TRY_AGAIN else None
    if said is None:
        dead = watch.silent() if code == EXIT_TRY_AGAIN else []
        if dead:
            names = " and ".join(store.few([store.name(i) for i in dead]))
            message = f"{names} died: killed, out of memory or preempted. {message}"
        said = watch.publish(message, code)
    if code == EXIT_TRY_AGAIN:
        message, code = said["message"], said["code"]
    _exit(message, code)


class Watch(threading.Thread):
    """Gives signs of life, and ends this process soon after another one failed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.step = 0
        self.on_preemption: Callable[[], None] | None = None
        self.ending = threading.Event()

    def run(self) -> None:
        pulse = 0
        while not self.ending.wait(PULSE):
            pulse += 1
            try:
                sign = f"{pulse} {self.step}"
                store.client().key_value_set(f"{ALIVE}/{store.me()}", sign, allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone: JAX's own client ends this one, and says so
            said = self.failure()
            if said and not self.ending.is_set():
                _exit(said["message"], said["code"])
            if self.on_preemption and _preempted():
                threading.Thread(target=self.on_preemption, daemon=True).start()
                self.on_preemption = None

    def failure(self) -> dict | None:
        """What the first process that failed has said."""
        try:
            return json.loads(store.client().key_value_try_get(FAILED))
        except jax.errors.JaxRuntimeError:  # nothing yet, or nobody to ask
            return None

    def publish(self, message: str, code: int) -> dict:
        """Says that this process failed, unless another one was faster; returns what was said."""
        said = {"message": f"{store.name(store.me())}: {message}", "code": code}
        try:
            store.client().key_value_set(FAILED, json.dumps(said))
        except jax.errors.JaxRuntimeError:
            return self.failure() or said
        return said

    def silent(self) -> list[int]:
        """Processes that give no sign of life; process 0 if nobody can be asked."""
        try:
            before = dict(store.client().key_value_dir_get(ALIVE))
            time.sleep(4 * PULSE)
            after = dict(store.client().key_value_dir_get(ALIVE))
        except jax.errors.JaxRuntimeError:
            return [0]
        others = {i: f"{ALIVE}/{i}" for i in store.hosts if i != store.me()}
        return [i for i, key in others.items() if before.get(key) == after.get(key)]


watch = Watch()
_exiting = threading.Lock()  # of two threads that find a failure, one reports it


def _exit(message: str, code: int) -> None:
    _exiting.acquire()
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    for child in multiprocessing.active_children():  # which os._exit would leave behind
        child.kill()
    if store.active() and store.me() == 0:
        time.sleep(3 * PULSE)  # the others read from this process why it fails
    sys.stdout.flush()
    os._exit(code)


def _preempted() -> bool:
    """Whether one of the processes was sent SIGTERM, as JAX's preemption service tells all."""
    try:
        return bool(store.client().key_value_try_get(PREEMPTED))
    except jax.errors.JaxRuntimeError:
        return False
