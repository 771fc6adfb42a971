"""Commands in processes that are forked after the imports, which take 2 s of a core each time.

multiprocessing's forkserver imports what the commands do, once for each process of pytest. It has a
single thread and has not used JAX, so a fork of it is as good as new. What a library reads from the
environment when it is imported must be as it was then: any other command gets a process of its own.
"""

import atexit
import importlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import jax

REPOSITORY = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# All that `train` imports, and most of what others do, but not the commands themselves.
NAMES = ("cli", "contrastive_boxes", "encoder", "evals", "init_from", "tokenizers", "watchdog")
IMPORTED = [f"supmim_jax.{name}" for name in NAMES]
for name in IMPORTED:  # some set variables, which new processes then inherit
    importlib.import_module(name)
STARTED_IN = dict(os.environ)
# Variables that are read each time that they are needed, or that `_run` hands on to JAX.
READ_LATE = {
    *("FAULT", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "PYTEST_CURRENT_TEST", "PYTEST_VERSION"),
    *("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
    *("NO_GCE_CHECK", "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"),
}

# How the names begin of variables that libraries set as tests import them.
OF_LIBRARIES = ("KMP_", "TF2_", "TPU_ML_", "HDF5_", "ENABLE_RUNTIME_UPTIME", "MPLBACKEND")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(IMPORTED)
if multiprocessing.parent_process() is None:  # or what a failed test left would be waited for
    atexit.register(lambda: [process.kill() for process in multiprocessing.active_children()])


class Process:
    """As subprocess.Popen, which it is given for, of a forked process in a session of its own."""

    def __init__(self, arguments: list[str], env: dict[str, str], merged: bool):
        self.directory = tempfile.TemporaryDirectory()  # it goes when this object goes
        self.files = [Path(self.directory.name, name) for name in ("stdout", "stderr")]
        written = [self.files[0 if merged else i] for i in (0, 1)]
        self.process = context.Process(target=_run, args=(arguments, env, written))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    poll = returncode.fget

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What was written to stdout and to stderr until the process ended."""
        self.wait(timeout)
        return tuple(file.read_text() if file.exists() else "" for file in self.files)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    arguments: list[str], cwd=REPOSITORY, env: dict[str, str] | None = None, merged: bool = False
) -> "Process | subprocess.Popen":
    """Python with these arguments, in a session of its own; `merged` writes stderr to stdout.

    `env` is all of its environment.
    """
    env = dict(os.environ if env is None else env)
    if _as_imported(arguments, cwd, env):
        return Process(arguments, env, merged)
    err = subprocess.STDOUT if merged else subprocess.PIPE
    options = {"stdout": subprocess.PIPE, "stderr": err, "start_new_session": True}
    return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, text=True, **options)


def _as_imported(arguments: list[str], cwd, env: dict[str, str]) -> bool:
    """Whether a fork is what a new process would be."""
    changed = {k for k in env | STARTED_IN if env.get(k) != STARTED_IN.get(k)} - READ_LATE
    changed = {k for k in changed if not k.startswith(OF_LIBRARIES)}
    same = changed <= {"PYTHONPATH"} and env.get("PYTHONPATH") in (None, "", REPOSITORY)
    return same and str(cwd) == REPOSITORY and arguments[0] != "-c"


def _run(arguments: list[str], env: dict[str, str], files: list[Path]) -> None:
    """In the forked process: what Python does between its start and its end."""
    os.setsid()
    for number, name in enumerate(files, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(REPOSITORY)
    sys.path.insert(0, REPOSITORY)
    jax.config.update("jax_num_cpu_devices", int(env.get("JAX_NUM_CPU_DEVICES", -1)))
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()  # multiprocessing leaves these out
