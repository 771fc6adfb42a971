"""How the processes of one run agree, and how they fail together.

`agree` compares what must be the same everywhere before the first collective: one that only some
processes reach hangs. A process that fails says so by `leave`, and each of the others watches for
that, as one that waits in a collective cannot be told in any other way.

All of it goes through the key-value store of JAX's coordination service, which process 0 runs. The
store has no public API; this package is the one place that uses it.
"""

import json
import os
import socket
import sys
import threading
import time

import jax
from jax._src import distributed as coordination
from jax.experimental import multihost_utils

from supmim_jax.config import SetupError
from supmim_jax.configdict import differences

EXIT_TRY_AGAIN = 1  # a process is missing or died; the same command may work the next time
PATIENCE = 300  # seconds for what another process, which is there, is about to say
PULSE = 2.0  # seconds between signs of life, and between looks at whether somebody failed
MOST = 5  # differences shown for a process, and processes shown
ROOT = "supmim_jax"
FAILED, ALIVE = f"{ROOT}/failed", f"{ROOT}/alive"


def active() -> bool:
    """Whether this process has joined others."""
    return coordination.global_state.client is not None


def agree(topic: str, here: dict[str, dict]) -> None:
    """Returns if `here`, sections of plain values, is the same on all processes.

    Raises:
      SetupError: on every process, naming those that differ from process 0, their hosts, and what.
    """
    if not active():
        return
    me, key, store = _me(), f"{ROOT}/agree/{topic}", _store()
    here = json.loads(json.dumps(here))
    if me == 0:
        store.key_value_set(f"{key}/wanted", json.dumps(here))
    wanted = json.loads(_heard(f"{key}/wanted", 0))
    found = [x for name in here for x in differences(wanted[name], here[name], name)]
    store.key_value_set(f"{key}/{me}", "; ".join(_few(found)))
    if me == 0:
        said = {i: _heard(f"{key}/{i}", i) for i in watch.hosts}
        odd = [f"{_name(i)}: {text}" for i, text in said.items() if text]
        store.key_value_set(f"{key}/verdict", "\n  ".join(_few(odd)))
    if verdict := _heard(f"{key}/verdict", 0):
        raise SetupError(
            f"The processes of this run have different {topic} ({_name(0)}; the one named):\n"
            f"  {verdict}\nStart all of them with the same."
        )


def barrier(name: str) -> None:
    """Waits for all processes, which must come at about the same time."""
    if active():
        _store().wait_at_barrier(f"{ROOT}/{name}", 1000 * PATIENCE)


def told_to_stop(step: int) -> bool:
    """Whether some process was sent SIGTERM, and this is the step at which all of them stop.

    All must call it after every step.
    """
    return active() and multihost_utils.reached_preemption_sync_point(step)


def begin() -> None:
    """Learns the hosts of the others and starts to watch."""
    state = coordination.global_state
    _store().key_value_set(f"{ROOT}/host/{_me()}", socket.gethostname())
    for i in range(state.num_processes):
        watch.hosts[i] = _heard(f"{ROOT}/host/{i}", i)
    if _me() == 0:  # an abort by JAX names a process by its number alone
        hosts = ", ".join(f"{i} on {host}" for i, host in watch.hosts.items())
        print(f"{state.num_processes} processes: {hosts}.", file=sys.stderr, flush=True)
    watch.start()


def end() -> None:
    """Stops watching, before the processes end one after the other."""
    if active():
        watch.ending.set()
        watch.join()


def leave(message: str, code: int) -> None:
    """Ends this process, and soon the others, with `message` and `code`; does not return.

    Python's own exit would wait for the others at a barrier, while they may wait for this one. An
    error with EXIT_TRY_AGAIN may only follow from the end of another process: then that is named.
    """
    said = watch.failure() if code == EXIT_TRY_AGAIN else None
    if said is None:
        dead = watch.silent() if code == EXIT_TRY_AGAIN else []
        if dead:
            names = " and ".join(_few([_name(i) for i in dead]))
            message = f"{names} died: killed, out of memory or preempted. {message}"
        said = watch.publish(message, code)
    if code == EXIT_TRY_AGAIN:
        message, code = said["message"], said["code"]
    _exit(message, code)


class Watch(threading.Thread):
    """Gives signs of life, and ends this process soon after another one failed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.hosts: dict[int, str] = {}
        self.ending = threading.Event()

    def run(self) -> None:
        pulse = 0
        while not self.ending.wait(PULSE):
            pulse += 1
            try:
                _store().key_value_set(f"{ALIVE}/{_me()}", str(pulse), allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone: JAX's own client ends this one, and says so
            said = self.failure()
            if said and not self.ending.is_set():
                _exit(said["message"], said["code"])

    def failure(self) -> dict | None:
        """What the first process that failed has said."""
        try:
            return json.loads(_store().key_value_try_get(FAILED))
        except jax.errors.JaxRuntimeError:  # nothing yet, or nobody to ask
            return None

    def publish(self, message: str, code: int) -> dict:
        """Says that this process failed, unless another one was faster; returns what was said."""
        said = {"message": f"{_name(_me())}: {message}", "code": code}
        try:
            _store().key_value_set(FAILED, json.dumps(said))
        except jax.errors.JaxRuntimeError:
            return self.failure() or said
        return said

    def silent(self) -> list[int]:
        """Processes that give no sign of life; process 0 if nobody can be asked."""
        try:
            before = dict(_store().key_value_dir_get(ALIVE))
            time.sleep(4 * PULSE)
            after = dict(_store().key_value_dir_get(ALIVE))
        except jax.errors.JaxRuntimeError:
            return [0]
        others = {i: f"{ALIVE}/{i}" for i in self.hosts if i != _me()}
        return [i for i, key in others.items() if before.get(key) == after.get(key)]


watch = Watch()
_exiting = threading.Lock()  # of two threads that find a failure, one reports it


def _exit(message: str, code: int) -> None:
    _exiting.acquire()
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    if _me() == 0:
        time.sleep(3 * PULSE)  # the others read from this process why it fails
    sys.stdout.flush()
    os._exit(code)


def _me() -> int:
    return coordination.global_state.process_id


def _store():
    return coordination.global_state.client


def _name(process: int) -> str:
    """A process as a person finds it."""
    host = watch.hosts.get(process)
    return f"process {process}" + (f" on {host}" if host else "")


def _heard(key: str, process: int) -> str:
    """The value of `key`, which `process` sets.

    Raises:
      SetupError: it does not.
    """
    try:
        return _store().blocking_key_value_get(key, 1000 * PATIENCE)
    except jax.errors.JaxRuntimeError:
        raise SetupError(
            f"{_name(process)} has joined, but said nothing for {PATIENCE} s. Its own output may "
            f"say why."
        ) from None


def _few(texts: list[str]) -> list[str]:
    rest = len(texts) - MOST
    return texts[:MOST] + ([f"and {rest} more"] if rest > 0 else [])
