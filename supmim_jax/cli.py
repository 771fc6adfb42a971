"""How commands start, read --config, print and fail.

A config file is Python. Its `experiment()` returns a Config or a ProbeConfig, or its
`get_config(argument)` returns a ConfigDict. Config files import each other as `configs.<name>`.
That package is the directory named `configs` above the file, from whatever directory the command
runs; what is missing there is looked up in the working directory's `configs`, then in the one of
the checkout that this package belongs to.

Output never ends a run: the reader of `2>&1 | head` may exit, a terminal may close, the disk of a
log may fill up, a shell may close stderr (2>&-), an encoding may lack a letter. Whatever cannot be
written is dropped.
"""

import importlib.util
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from supmim_jax import environment, multihost, storage
from supmim_jax.config import Config, debug
from supmim_jax.config.configdict import section, to_configdict
from supmim_jax.data import source
from supmim_jax.errors import OF_THE_USER, ConfigError, SetupError
from supmim_jax.multihost import EXIT_SETUP
from supmim_jax.watchdog import Diverged

PACKAGE = "configs"
HERE = Path(__file__).resolve().parent
LONGEST = 500  # characters of what an error in a file says


EXIT_DIVERGED = 3  # training met NaN or infinity

# Of config.data: where and how a host reads; all else must be the same on every host.
PER_HOST = ("data_dir", "workers", "threads", "prefetch")

# In what JAX says of a device that it cannot use: another process has it, or it is not ready.
MAY_PASS = ("in use", "OUT_OF_MEMORY", "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED")

# What ml_collections says of a value for a whole section, and what to do.
SECTION = (
    r"^flag (--\S+?)=.*: Failed to parse .* as a ConfigDict: .*",
    r"\1 is a section: give one of its fields, as in --config.optim.lr=3e-3, or take a config file "
    r"with another section",
)

# What absl and ml_collections raise for a wrong flag, key or value.
MISTAKES = (flags.Error, OSError, LookupError, AttributeError, TypeError, ValueError)


def start(run: Callable[[], None]) -> None:
    """Parses the flags and runs; errors that the user can fix print a paragraph, no traceback."""

    def main(argv: list[str]) -> None:
        if len(argv) > 1:
            fail(f"Unknown argument {argv[1]!r}; flags begin with --.", EXIT_SETUP)
        logging.set_verbosity(logging.ERROR)
        source.allow_many_files()
        try:
            run()
        except SetupError as error:
            # What was being handled as it was raised: a disk or network that failed for a moment.
            passes = storage.may_pass(error.__context__)
            fail(str(error), multihost.EXIT_TRY_AGAIN if passes else EXIT_SETUP)
        except Diverged as error:
            fail(str(error), EXIT_DIVERGED)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_USER:
                fail(f"{error}. The same command goes on once that is changed.", EXIT_SETUP)
            if refused := storage.denied(error):
                fail(refused, EXIT_SETUP)
            if no_device := environment.no_device(error):
                busy = any(word in no_device for word in MAY_PASS)
                fail(no_device, multihost.EXIT_TRY_AGAIN if busy else EXIT_SETUP)
            if isinstance(error, ChildProcessError):
                fail(str(error), multihost.EXIT_TRY_AGAIN)
            if not multihost.active():
                raise
            traceback.print_exc()
            reason = str(error).strip().partition("\n")[0]
            fail(f"{type(error).__name__}: {reason}", multihost.EXIT_TRY_AGAIN)
        if lost := _lost_output():
            fail(f"stdout has not all of what was printed: {lost}. Print elsewhere.", EXIT_SETUP)
        multihost.end_watch()

    _guard_output()
    environment.rely()
    multihost.listen()
    # All drawing goes to files. What a notebook left here is for its own windows, and matplotlib
    # cannot even be imported where it knows no such backend.
    os.environ["MPLBACKEND"] = "agg"
    try:
        app.run(main, flags_parser=parse)
    finally:
        _end_output()


def parse(argv: list[str]) -> list[str]:
    """Parses absl's flags; a mistake in one (also in --config.<key>) prints a paragraph, too."""
    try:
        return flags.FLAGS(argv)
    except SystemExit:  # after --help, which absl ends with 1
        sys.exit(0)
    except SetupError as error:  # of the config file
        return fail(str(error), EXIT_SETUP)
    except MISTAKES as error:
        text = error
        # ml_collections wraps a KeyError, which str() shows quoted and with line ends as \\n.
        while isinstance(text, LookupError | AttributeError) and text.args:
            text = text.args[0]
        said = re.sub(*SECTION, " ".join(str(text).split()))
        return fail(f"{said} (in the command line)", EXIT_SETUP)


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
    """Joins the other processes of this run, if the flags name any.

    Raises:
      SetupError: nothing tells which process this is.
    """
    given = flags.FLAGS
    if given.distributed or given.coordinator:
        numbers = (given.num_processes, given.process_id)
        where = multihost.place(given.coordinator, *numbers, os.environ)
        multihost.join(where, given.join_timeout)


def agree(cfg: Config, command: dict) -> None:
    """Checks that all processes have the same config, command, code, versions and devices.

    Raises:
      SetupError: on every process, naming those that differ from process 0, and in what.
    """
    if not multihost.active():
        return
    config = section(cfg)
    config["data"] = {k: v for k, v in config["data"].items() if k not in PER_HOST}
    versions = environment.versions() | environment.flags()
    same = {"config": config, "command": command, "versions": versions}
    multihost.agree("settings or code", same | {"code": environment.sources()})
    # Only now: to ask for its devices, JAX has all processes exchange theirs.
    devices = jax.local_devices()
    local = {"kind": devices[0].device_kind, "count": len(devices)}
    multihost.agree("devices", {"devices": local})


def fail(message: str, code: int):
    """Ends the command, in all of its processes."""
    if multihost.active():
        multihost.leave(message, code)
    print(f"\nerror: {message}", file=sys.stderr)
    sys.exit(code)


# --- config files


def define(text: str) -> flags.FlagHolder:
    """The flag --config, with an override for each value: --config.optim.lr=3e-3."""
    holder = config_flags.DEFINE_config_file("config", None, text)
    flags.FLAGS["config"].parser = _Parser()
    return holder


def load(given: str) -> ConfigDict:
    """The ConfigDict of `path` or `path:argument`; see the module's docstring.

    Raises:
      SetupError: as `read`, or the file gives something else.
    """
    config = read(given, _config)
    if not isinstance(config, ConfigDict):
        raise SetupError(
            f"{given}: get_config() returns {type(config).__name__}; it must return the ConfigDict "
            f"that supmim_jax.config.configdict.to_configdict makes of a Config or ProbeConfig. Or "
            f"the file may have a function experiment() that returns one of these."
        )
    return config


def read(given: str, use: Callable[..., Any], flag: str = "--config") -> Any:
    """Returns `use(module)` of the module at `path`, or `use(module, argument)`.

    Raises:
      SetupError: the file is missing or cannot be run, or `use` fails; the message names it and
        the line.
    """
    name, colon, argument = given.partition(":")
    try:
        name = str(Path(name).expanduser())
        Path(name).read_bytes()
    except (OSError, ValueError, RuntimeError) as error:
        raise SetupError(
            f"{flag} names no readable file: {error}. Give the path of one, as in configs/."
        ) from None
    path = Path(name).resolve()
    try:
        _find_others(path)
        loader = SourceFileLoader("config_file", str(path))
        spec = importlib.util.spec_from_file_location("config_file", path, loader=loader)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return use(module, *[argument] * bool(colon))
    except BaseException as error:  # the file may raise anything, SystemExit too
        said = " ".join(str(error).split())[:LONGEST]
        kind = "" if isinstance(error, SetupError) else f"{type(error).__name__}: "
        raise SetupError(f"{_place(error, path)}: {kind}{said}") from None


def _config(module: ModuleType, *argument: str) -> ConfigDict:
    """What get_config() returns, or experiment(), which the argument "debug" shrinks."""
    if hasattr(module, "get_config"):
        return module.get_config(*argument)
    config, asked = module.experiment(), "".join(argument)
    known = ("", "debug") if isinstance(config, Config) else ("",)
    if asked not in known:
        raise ConfigError(
            f"the config argument {asked!r} is unknown; known are {', '.join(map(repr, known))}."
        )
    return to_configdict(debug(config) if asked else config)


class _Parser(flags.ArgumentParser):
    """Replaces ml_collections' parser, which lets most exceptions of a config file through."""

    def parse(self, argument: str) -> ConfigDict:
        return load(argument).lock()

    def flag_type(self) -> str:
        return "config object"


def _find_others(path: Path) -> None:
    """Makes `configs` the package that the file belongs to."""
    own = [parent for parent in path.parents if parent.name == PACKAGE][:1]
    among = [*own, Path.cwd() / PACKAGE, HERE.parent / PACKAGE]
    found = list(dict.fromkeys(str(x.resolve()) for x in among if x.is_dir()))
    known = sys.modules.get(PACKAGE)
    if not found or list(getattr(known, "__path__", ())) == found:
        return
    for name in [x for x in sys.modules if x.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    spec = ModuleSpec(PACKAGE, None, is_package=True)
    if (start := Path(found[0], "__init__.py")).exists():
        spec = importlib.util.spec_from_file_location(PACKAGE, start, submodule_search_locations=[])
    spec.submodule_search_locations[:] = found
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    if spec.has_location:
        spec.loader.exec_module(module)


def _place(error: BaseException, path: Path) -> str:
    """The file and line of the user's code that raised the error."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).exists():
        return f"{error.filename}, line {error.lineno}"
    others = (str(HERE), *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(others):
            return f"{frame.filename}, line {frame.lineno}"
    return str(path)


# --- what a person sees


class _Stream:
    """A stream of text that drops what it cannot write, and remembers the last reason."""

    def __init__(self, stream):
        self.stream, self.fault = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable, *values) -> None:
        try:
            do(*values)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.fault = error


def _guard_output() -> None:
    """Makes stdout and stderr drop what they cannot write.

    Where they are closed, they become /dev/null: the next file that is opened would get their
    number, and be written to by whatever prints.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Stream(stream))


def _lost_output() -> OSError | None:
    """Why stdout is incomplete; None if only its reader left, who had read enough."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    return fault if isinstance(fault, OSError) and fault.errno in OF_THE_USER else None


def _end_output() -> None:
    """Gives up what could not be written, or Python would complain about it at exit."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if getattr(stream, "fault", None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
