"""Several processes as one run: how they find each other, agree, end and fail together.

Whatever must be the same everywhere is compared before the first collective, because a collective
that only some processes reach hangs. A process that fails says so through `leave`, and all others
watch for that: a process that waits in a collective can be told in no other way. They communicate
through the key-value store of JAX's coordination service, which lives in process 0. It has no
public API, and no other module uses it.

SIGTERM, Ctrl-C and SIGHUP end a command, of one process or many, as soon as nothing would be lost.
Steps that no checkpoint holds are saved first (see `told_to_stop`). At any other time (start-up,
compilation, evaluation, a command whose work is in complete files) the process ends at once. A
thread does this, because Python runs a signal's handler only when the main thread's current
compilation or collective returns.
"""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
from jax._src import distributed as coordination
from jax.experimental import multihost_utils

from supmim_jax.config.configdict import differences
from supmim_jax.errors import SetupError, first_few

EXIT_TRY_AGAIN = 1  # a process is missing or died; the same command may work the next time
EXIT_SETUP = 2  # the config, data, workdir or checkpoint must be changed first
HEARTBEAT = 20  # seconds of silence after which JAX's own service takes a process for dead
PATIENCE = 300  # seconds for what another process, which is there, is about to say
PULSE = 2.0  # seconds between signs of life, and between looks at whether somebody failed
ROOT = "supmim_jax"  # of all keys
FAILED, ALIVE = f"{ROOT}/failed", f"{ROOT}/alive"
PREEMPTED = "RECEIVED_PREEMPTION_NOTICE"  # of XLA's preemption_sync_manager.cc
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TWICE = 0.5  # seconds: a wrapper that passes Ctrl-C on sends it again at once; no person does

hosts: dict[int, str] = {}  # by process, once all have joined


# --- finding each other


class Place(NamedTuple):
    """Which process of how many this is, and where the first one listens; unset: JAX finds out."""

    coordinator: str = ""  # host:port
    processes: int = 0
    process: int = -1


def place(coordinator: str, processes: int, process: int, env: Mapping[str, str]) -> Place:
    """The place that the flags give, or else the environment: all of it or none.

    Kubernetes numbers the pods of an indexed Job in JOB_COMPLETION_INDEX.

    Raises:
      SetupError: some of it is missing, or is no number in range.
    """
    number = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", "-1"))
    try:
        where = Place(
            coordinator or env.get("JAX_COORDINATOR_ADDRESS", ""),
            processes or int(env.get("JAX_NUM_PROCESSES", "0")),
            process if process >= 0 else int(number),
        )
    except ValueError as error:
        raise SetupError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: {error}") from None
    if not where.coordinator and not processes and process < 0:
        return Place()
    if ":" not in where.coordinator or not 0 <= where.process < where.processes:
        raise SetupError(
            f"This is process {where.process} of {where.processes} with the coordinator "
            f"{where.coordinator!r}. Give each process --coordinator=<host of the first>:<port>, "
            f"--num_processes=<n> and --process_id=<0 to n-1>, or JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID; none of them on a TPU VM or in a Slurm job."
        )
    return where


def join(where: Place, timeout: int) -> None:
    """Joins the other processes of this run; all must come within `timeout` seconds.

    Raises:
      SetupError: nothing tells which process this is, or the first one cannot listen.
    """
    joined = threading.Event()
    threading.Thread(target=_give_up_in_time, args=(where, timeout, joined), daemon=True).start()
    options = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": HEARTBEAT}
    if where.coordinator:  # else a Slurm job or TPU would still be asked for what is missing
        options |= {
            "coordinator_address": where.coordinator,
            "num_processes": where.processes,
            "process_id": where.process,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=60, **options)
    except (ValueError, RuntimeError) as error:
        if where.coordinator:
            raise SetupError(f"Process {where.process} cannot join the others: {error}") from None
        raise SetupError(
            f"--distributed found no TPU VM or Slurm job: {error} Elsewhere, give each process "
            f"--coordinator, --num_processes and --process_id."
        ) from None
    finally:
        joined.set()
    state, key = coordination.global_state, f"{ROOT}/host"
    state.client.key_value_set(f"{key}/{state.process_id}", socket.gethostname())
    hosts.update({i: _heard(f"{key}/{i}", i) for i in range(state.num_processes)})
    if state.process_id == 0:  # an abort by JAX names a process by its number alone
        names = ", ".join(f"{i} on {host}" for i, host in hosts.items())
        print(f"{state.num_processes} processes: {names}.", file=sys.stderr, flush=True)
    _watch.start()


def _give_up_in_time(where: Place, timeout: int, joined: threading.Event) -> None:
    """Ends this process before JAX does, which would abort with a stack trace without a cause.

    The first process may give up a moment earlier, so whether it was there is asked all along.
    """
    until, answered, state = time.monotonic() + 0.8 * timeout, False, coordination.global_state
    while not joined.wait(min(1.0, timeout / 10)):
        address = state.coordinator_address or where.coordinator
        first = state.service is not None
        answered = answered or (not first and _answers(address))
        if time.monotonic() < until:
            continue
        missing = "others did not come" if first or answered else "process 0 did not come"
        seen = "" if first else f"; {address} {'answered' if answered else 'did not answer'}"
        print(
            f"\nerror: Process {state.process_id} on {socket.gethostname()} waited "
            f"{0.8 * timeout:.0f} s, and {missing}{seen}. Start the same command on every host "
            f"within that time, and look at the output of those that are missing. --join_timeout "
            f"gives them longer.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(EXIT_TRY_AGAIN)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


# --- agreeing


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
    key = f"{ROOT}/agree/{topic}"
    _store().key_value_set(f"{key}/{_me()}", json.dumps(here))
    if _me() == 0:
        said = [json.loads(_heard(f"{key}/{i}", i)) for i in hosts]
        odd = []
        for i, there in enumerate(said):
            changed = [x for name in here for x in differences(said[0][name], there[name], name)]
            odd += [f"{_name(i)}: {first_few(changed)}"] if changed else []
        _store().key_value_set(f"{key}/verdict", first_few(odd, "\n  "))
    if verdict := _heard(f"{key}/verdict", 0):
        raise SetupError(
            f"The processes of this run have different {topic} ({_name(0)}; the one named):\n"
            f"  {verdict}\nStart all of them with the same."
        )


def barrier(name: str) -> None:
    """Waits for all processes, which must come at about the same time."""
    if active():
        _store().wait_at_barrier(f"{ROOT}/{name}", 1000 * PATIENCE)


def gather(topic: str, here: str, patience: float = PATIENCE) -> list[str]:
    """What each process says about `topic`, a name used once; all must call it."""
    if not active():
        return [here]
    key = f"{ROOT}/gather/{topic}"
    _store().key_value_set(f"{key}/{_me()}", here)
    return [_heard(f"{key}/{i}", i, patience) for i in hosts]


def _store():
    """The key-value store, as this process reaches it."""
    return coordination.global_state.client


def _me() -> int:
    return coordination.global_state.process_id


def _name(process: int) -> str:
    """A process as a person finds it."""
    host = hosts.get(process)
    return f"process {process}" + (f" on {host}" if host else "")


def _heard(key: str, process: int, patience: float = PATIENCE) -> str:
    """The value of `key`, which `process` sets; raises SetupError if it does not."""
    try:
        return _store().blocking_key_value_get(key, int(1000 * patience))
    except jax.errors.JaxRuntimeError:
        raise SetupError(
            f"{_name(process)} has joined, but said nothing for {patience:.0f} s. Its own output "
            f"may say why."
        ) from None


# --- failing together


def reached(step: int) -> None:
    """Notes how far this process is, for `behind`."""
    _watch.step = step


def behind() -> str:
    """The processes that have reached fewer steps than others; "" for none, or where none joined.

    What they have said of themselves may be PULSE seconds old.
    """
    if not active():
        return ""
    if (signs := _signs()) is None:
        return _name(0)
    steps = {i: int(sign.split()[1]) for i, sign in signs.items()}
    late = [f"{_name(i)} at step {n}" for i, n in sorted(steps.items()) if n < max(steps.values())]
    return first_few(late, ", ")


def end_watch() -> None:
    """Stops watching, before the processes end one after the other."""
    if active():
        _watch.ending.set()
        _watch.join()


def leave(message: str, code: int) -> None:
    """Ends this process, and soon the others, with `message` and `code`; does not return.

    Any thread may call it. Python's own exit would wait for the others at a barrier, while they may
    wait for this one. An error with EXIT_TRY_AGAIN may only follow from the end of another process:
    then that is named.
    """
    if active():
        first = _read(FAILED) if code == EXIT_TRY_AGAIN else ""
        if not first:
            if code == EXIT_TRY_AGAIN and (dead := _silent()):
                names = first_few([_name(i) for i in dead], " and ")
                message = f"{names} died: killed, out of memory or preempted. {message}"
            first = json.dumps([f"{_name(_me())}: {message}", code])
            try:
                _store().key_value_set(FAILED, first)
            except jax.errors.JaxRuntimeError:  # another one was faster
                first = _read(FAILED) or first
        if code == EXIT_TRY_AGAIN:
            message, code = json.loads(first)
    _exit(message, code)


class _Watch(threading.Thread):
    """Gives signs of life, and ends this process soon after another one failed."""

    def __init__(self):
        super().__init__(daemon=True)
        self.step, self.ending = 0, threading.Event()

    def run(self) -> None:
        preempted = False
        for pulse in itertools.count():
            if self.ending.wait(PULSE):
                return
            try:
                sign = f"{pulse} {self.step}"
                _store().key_value_set(f"{ALIVE}/{_me()}", sign, allow_overwrite=True)
            except jax.errors.JaxRuntimeError:
                continue  # process 0 is gone: JAX's own client ends this one, and says so
            said = _read(FAILED)
            if said and not self.ending.is_set():
                _exit(*json.loads(said))
            if not preempted and _read(PREEMPTED):
                preempted = True
                threading.Thread(target=_end_when_saved, daemon=True).start()


_watch = _Watch()
_exiting = threading.Lock()  # of two threads that find a failure, one reports it


def _signs() -> dict[int, str] | None:
    """The newest sign of life of each process; None: process 0 is gone, so nobody can be asked."""
    try:
        signs = _store().key_value_dir_get(ALIVE)
    except jax.errors.JaxRuntimeError:
        return None
    return {int(key.rpartition("/")[2]): sign for key, sign in signs}


def _silent() -> list[int]:
    """The processes that give no sign of life."""
    before = _signs()
    time.sleep(4 * PULSE)
    after = _signs()
    if before is None or after is None:
        return [0]
    return [i for i in hosts if i != _me() and before.get(i) == after.get(i)]


def _read(key: str) -> str:
    """A value of the store; "" where there is none, or nobody can be asked."""
    try:
        return _store().key_value_try_get(key)
    except jax.errors.JaxRuntimeError:
        return ""


def _exit(message: str, code: int) -> None:
    _exiting.acquire()
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    _kill_children()
    if _watch.is_alive() and _me() == 0:
        time.sleep(3 * PULSE)  # the others read from this process why it fails
    sys.stdout.flush()
    os._exit(code)


def _kill_children() -> None:
    for child in multiprocessing.active_children():  # which os._exit would leave behind
        child.kill()


# --- ending at a signal


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
    threading.Thread(target=_act_on_signals, args=(read,), daemon=True).start()


def stopped() -> tuple[str, int]:
    """What a run that was told to stop says at its end, and its exit code, as a shell reports it.

    Of several processes those that were not sent the signal themselves name SIGTERM.
    """
    number = _first[0] if _first else signal.SIGTERM
    said = f"Stopped by {signal.Signals(number).name}. The same command goes on from what is saved."
    return said, 128 + number


def told_to_stop(step: int) -> bool:
    """Whether the run must save after this step and end; the same on all processes.

    All must call it after every step.
    """
    if active():
        return multihost_utils.reached_preemption_sync_point(step)
    return _told.is_set()


def finish_first(finish: Callable[[], None] | None) -> None:
    """From now on a process that a signal ends calls `finish` first, so that a save completes."""
    _unsaved.finish = finish


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
def released() -> Iterator[None]:
    """Inside, all steps are saved, or will be once what `finish_first` was given has returned."""
    release()
    yield
    hold()  # not after an error: nothing is done then that would have to be saved


def _end_when_saved() -> None:
    """Ends this process once nothing would be lost."""
    _told.set()
    with _unsaved.lock:
        try:
            if _unsaved.finish:
                _unsaved.finish()
        except SetupError as error:
            leave(str(error), EXIT_SETUP)
        except Exception as error:
            leave(f"{type(error).__name__}: {error}", EXIT_TRY_AGAIN)
        leave(*stopped())


def _act_on_signals(read: int) -> None:
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
                _kill_children()  # whoever presses Ctrl-C twice will not wait
                text = "\nerror: Ended at once; steps since the newest checkpoint are lost."
                print(text, file=sys.stderr)
                os._exit(128 + signal.SIGINT)
            if number != signal.SIGTERM and active():
                os.kill(os.getpid(), signal.SIGTERM)  # which JAX's service tells to all
                continue
            if number == signal.SIGINT and _unsaved.held and not _told.is_set():
                print("\nSaving the step under way; Ctrl-C again ends at once.", file=sys.stderr)
            threading.Thread(target=_end_when_saved, daemon=True).start()
