"""How the processes of one run find each other."""

import dataclasses
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping

import jax

from supmim_jax.config import SetupError
from supmim_jax.distributed import store, watch

HEARTBEAT = 20  # seconds of silence after which JAX's own service takes a process for dead


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many this is, and where the first one listens; unset: JAX finds out."""

    coordinator: str = ""  # host:port
    processes: int = 0
    process: int = -1

    @property
    def given(self) -> bool:
        return bool(self.coordinator)


def place(coordinator: str, processes: int, process: int, env: Mapping[str, str]) -> Place:
    """The place that the flags give, or else the environment: all of it or none.

    Kubernetes numbers the pods of an indexed Job in JOB_COMPLETION_INDEX.

    Raises:
      SetupError: some of it is missing, or is no number in range.
    """
    number = env.get("JAX_PROCESS_ID", env.get("JOB_COMPLETION_INDEX", "-1"))
    try:
        found = Place(
            coordinator or env.get("JAX_COORDINATOR_ADDRESS", ""),
            processes or int(env.get("JAX_NUM_PROCESSES", "0")),
            process if process >= 0 else int(number),
        )
    except ValueError as error:
        raise SetupError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID must be numbers: {error}") from None
    if not found.coordinator and not processes and process < 0:
        return Place()
    if ":" not in found.coordinator or not 0 <= found.process < found.processes:
        raise SetupError(
            f"This is process {found.process} of {found.processes} with the coordinator "
            f"{found.coordinator!r}. Give each process --coordinator=<host of the first>:<port>, "
            f"--num_processes=<n> and --process_id=<0 to n-1>, or JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID; none of them on a TPU VM or in a Slurm job."
        )
    return found


def join(where: Place, timeout: int) -> None:
    """Joins the other processes of this run; all must come within `timeout` seconds.

    Raises:
      SetupError: nothing tells which process this is, or the first one cannot listen.
    """
    joined = threading.Event()
    threading.Thread(target=_wait, args=(where, timeout, joined), daemon=True).start()
    options = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": HEARTBEAT}
    if where.given:  # else a Slurm job or TPU would still be asked for what is missing
        options |= {
            "coordinator_address": where.coordinator,
            "num_processes": where.processes,
            "process_id": where.process,
            "cluster_detection_method": "deactivate",
        }
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=60, **options)
    except (ValueError, RuntimeError) as error:
        if where.given:
            raise SetupError(f"Process {where.process} cannot join the others: {error}") from None
        raise SetupError(
            f"--distributed found no TPU VM or Slurm job: {error} Elsewhere, give each process "
            f"--coordinator, --num_processes and --process_id."
        ) from None
    finally:
        joined.set()
    watch.begin()


def _wait(where: Place, timeout: int, joined: threading.Event) -> None:
    """Gives up before JAX does, which would abort with a stack trace that names no process.

    The first process may give up a moment earlier, so whether it was there is asked all along.
    """
    until, there = time.monotonic() + 0.8 * timeout, False
    while not joined.wait(min(1.0, timeout / 10)):
        if store.state().service is None:
            there = there or _answers(_address(where))
        if time.monotonic() >= until:
            _give_up(where, timeout, there)


def _address(where: Place) -> str:
    return store.state().coordinator_address or where.coordinator


def _give_up(where: Place, timeout: int, there: bool) -> None:
    """Says which process is missing."""
    state, address = store.state(), _address(where) or "the first process"
    me = f"Process {state.process_id} on {socket.gethostname()}"
    if state.service is not None:
        missing = "others did not come"
        came = sorted(_callers(int(address.rpartition(":")[2])))
        seen = f"; connected are {', '.join(came)}" if came else "; nobody is connected"
    else:
        missing = "others did not come" if there else "process 0 did not come"
        seen = f"; {address} {'answered' if there else 'did not answer'}"
    print(
        f"\nerror: {me} waited {0.8 * timeout:.0f} s, and {missing}{seen}. Start the same command "
        f"on every host within that time, and look at the output of those that are missing. "
        f"--join_timeout gives them longer.",
        file=sys.stderr,
        flush=True,
    )
    os._exit(watch.EXIT_TRY_AGAIN)


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=3).close()
    except (OSError, ValueError):
        return False
    return True


def _callers(port: int) -> set[str]:
    """Addresses with a connection to this port, where the system is Linux."""
    found = set()
    for table, family in (("/proc/net/tcp", socket.AF_INET), ("/proc/net/tcp6", socket.AF_INET6)):
        try:
            with open(table) as file:
                lines = [line.split() for line in file.readlines()[1:]]
        except OSError:
            continue
        for here, there, state in (line[1:4] for line in lines):
            if state == "01" and int(here.rpartition(":")[2], 16) == port:
                words = bytes.fromhex(there.rpartition(":")[0])
                packed = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(socket.inet_ntop(family, packed).removeprefix("::ffff:"))
    return found
