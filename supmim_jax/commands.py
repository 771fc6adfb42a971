"""How the commands start and how they fail."""

import os
import sys
import traceback
from collections.abc import Callable

import jax
from absl import app, flags, logging

from supmim_jax import display, distributed, environment, preemption, storage
from supmim_jax.config import OF_THE_USER, Config, SetupError
from supmim_jax.configdict import section
from supmim_jax.data import readers
from supmim_jax.finite import Diverged
from supmim_jax.preemption import EXIT_SETUP

EXIT_DIVERGED = 3  # training met NaN or infinity

# Of config.data: where and how a host reads; all else must be the same on every host.
PER_HOST = ("data_dir", "workers", "threads", "prefetch")

# In what JAX says of a device that it cannot use: another process has it, or it is not ready.
MAY_PASS = ("in use", "OUT_OF_MEMORY", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")

# What absl and ml_collections raise for a wrong flag, key or value.
MISTAKES = (flags.Error, OSError, LookupError, AttributeError, TypeError, ValueError)


def start(run: Callable[[], None]) -> None:
    """Parses the flags and runs; what the user can fix is a paragraph on stderr, no traceback."""

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"Unknown argument {argv[1]!r}; flags begin with --.", EXIT_SETUP)
        logging.set_verbosity(logging.ERROR)
        readers.allow_many_files()
        try:
            run()
        except SetupError as error:
            # What was being handled as it was raised: a disk or network that failed for a moment.
            passes = storage.may_pass(error.__context__)
            fail(str(error), distributed.EXIT_TRY_AGAIN if passes else EXIT_SETUP)
        except Diverged as error:
            fail(str(error), EXIT_DIVERGED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_USER:
                fail(f"{error}. The same command goes on once that is changed.", EXIT_SETUP)
            if refused := storage.denied(error):
                fail(refused, EXIT_SETUP)
            if no_device := environment.no_device(error):
                busy = any(word in no_device for word in MAY_PASS)
                fail(no_device, distributed.EXIT_TRY_AGAIN if busy else EXIT_SETUP)
            if isinstance(error, ChildProcessError):
                fail(str(error), distributed.EXIT_TRY_AGAIN)
            if not distributed.active():
                raise
            traceback.print_exc()
            reason = str(error).strip().partition("\n")[0]
            fail(f"{type(error).__name__}: {reason}", distributed.EXIT_TRY_AGAIN)
        if lost := display.lost():
            fail(f"stdout has not all of what was printed: {lost}. Print elsewhere.", EXIT_SETUP)
        distributed.end()

    display.guard()
    environment.rely()
    preemption.listen()
    # All drawing goes to files. What a notebook left here is for its own windows, and matplotlib
    # cannot even be imported where it knows no such backend.
    os.environ["MPLBACKEND"] = "agg"
    try:
        app.run(main, flags_parser=parse)
    finally:
        display.end()


def parse(argv: list[str]) -> list[str]:
    """absl's flags; a mistake in one (also in --config.<key>) is a paragraph too."""
    try:
        return flags.FLAGS(argv)
    except SetupError as error:  # of the config file
        return fail(str(error), EXIT_SETUP)
    except MISTAKES as error:
        return fail(f"{error} (in the command line)", EXIT_SETUP)


def define_process_flags() -> None:
    """The flags that `join` reads."""
    flags.DEFINE_bool(
        "distributed", False, "One of several processes; a TPU VM or Slurm tell it which."
    )
    flags.DEFINE_string(
        "coordinator", "", "host:port of process 0, where neither does [JAX_COORDINATOR_ADDRESS]."
    )
    flags.DEFINE_integer("num_processes", 0, "How many [JAX_NUM_PROCESSES].", lower_bound=0)
    flags.DEFINE_integer(
        "process_id", -1, "Which one, from 0 [JAX_PROCESS_ID, JOB_COMPLETION_INDEX]."
    )
    flags.DEFINE_integer("join_timeout", 60, "Seconds until all must have come.", lower_bound=5)


def join() -> None:
    """Joins the other processes of this run, if the flags say that there are any.

    Raises:
      SetupError: nothing tells which process this is.
    """
    given = flags.FLAGS
    if given.distributed or given.coordinator:
        numbers = (given.num_processes, given.process_id)
        where = distributed.place(given.coordinator, *numbers, os.environ)
        distributed.join(where, given.join_timeout)


def agree(cfg: Config, command: dict) -> None:
    """Returns if all processes run the same config, command, code, versions and devices.

    Raises:
      SetupError: on every process, naming those that differ from process 0, and in what.
    """
    if not distributed.active():
        return
    config = section(cfg)
    config["data"] = {k: v for k, v in config["data"].items() if k not in PER_HOST}
    versions = environment.versions() | environment.flags()
    same = {"config": config, "command": command, "versions": versions}
    distributed.agree("settings or code", same | {"code": environment.sources()})
    # Only now: to ask for its devices, JAX has all processes exchange theirs.
    devices = jax.local_devices()
    local = {"kind": devices[0].device_kind, "count": len(devices)}
    distributed.agree("devices", {"devices": local})


def fail(message: str, code: int):
    """Ends the command; of several processes, all of them."""
    if distributed.active():
        distributed.leave(message, code)
    print(f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)
