"""Runs commands, each in a fork of this process, which has imported the libraries they need.

To import them takes longer than most of what tests ask of a command. This package is imported in
the fork, as by `python -m`. A command comes as a line of JSON, and its exit code is the answer.
"""

import importlib
import json
import os
import runpy
import sys
import warnings

LIBRARIES = (
    "supmim_jax",  # first: it sets what others read from the environment
    *("jax", "flax.nnx", "optax.contrib", "orbax.checkpoint", "grain.experimental"),
    "tensorflow_datasets.core.features",
)


def forked() -> dict:
    """The next command, in a process of its own; the parent never returns."""
    while line := sys.stdin.readline():
        if not (child := os.fork()):
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


for name in LIBRARIES:
    importlib.import_module(name)
del sys.modules["supmim_jax"]
with warnings.catch_warnings(action="ignore"):  # JAX warns of forks
    asked = forked()
os.environ.clear()
os.environ.update(asked["env"])
devices = int(os.environ["JAX_NUM_CPU_DEVICES"])
sys.modules["jax"].config.update("jax_num_cpu_devices", devices)
os.chdir(asked["cwd"])
sys.path[0] = asked["cwd"]
for number, path in enumerate((os.devnull, asked["out"], asked["err"])):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
_, module, *arguments = asked["arguments"]
sys.argv = ["-m", *arguments]
runpy.run_module(module, run_name="__main__", alter_sys=True)
