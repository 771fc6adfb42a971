"""The time from a command to its first step is said, and a second start finds compiled programs."""

import io
import os
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from conftest import REPOSITORY

from supmim_jax import metrics

# This runs `train`, and prints what was compiled before the first step.
PROGRAM = """
import runpy, sys, jax
from supmim_jax import metrics
compiled, started = [], metrics.ProgressLine.started
def listen(event, seconds, **about):
    if event.endswith("backend_compile_duration"):
        compiled.append(about["fun_name"])
def first(*arguments):
    print("compiled:", *compiled, file=sys.stderr)
    started(*arguments)
jax.monitoring.register_event_duration_secs_listener(listen)
metrics.ProgressLine.started = first
runpy.run_module("supmim_jax.train", run_name="__main__")
"""


def test_seconds_since_the_process_began():
    program = "import time; time.sleep(0.3); from supmim_jax import metrics; "
    program += "print(metrics.seconds_since_start())"
    out = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert 0.3 < float(out.stdout) < 600  # an upper bound that no load reaches


def test_without_proc_it_counts_from_the_import(monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(metrics.Path, "read_text", gone)
    monkeypatch.setattr(metrics, "IMPORTED", metrics.time.perf_counter() - 1000)
    assert 1000 <= metrics.seconds_since_start() < 1600


def test_the_first_step_is_said_once(cfg):
    stream = io.StringIO()
    metrics.ProgressLine(cfg, stream).started(7, {"loss": jnp.ones(())})
    said = r"Step 7 is done \d+\.\d s after this process began\.\n"
    assert re.fullmatch(said, stream.getvalue())


def test_a_run_keeps_its_programs_and_says_when_it_begins(tmp_path, data_dir):
    compiled = tmp_path / "compiled"
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(compiled)}
    command = [sys.executable, "-c", PROGRAM, "--config=configs/debug.py", "--config.epochs=1"]
    command += ["--config.model.width=16", "--config.model.depth=1"]
    command += ["--config.eval.which=('top1',)", f"--config.data.data_dir={data_dir}", "--workdir"]

    def run(name: str) -> str:
        out = subprocess.run(
            [*command, str(tmp_path / name)],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert out.returncode == 0, out.stderr
        return out.stderr

    said = [run(name) for name in ("cold", "warm")]
    entries = {path.name for path in compiled.glob("jit_step*-cache")}
    assert len(entries) == 1  # the second run added none
    assert all(len(re.findall(r"Step 1 is done .* after this process", x)) == 1 for x in said)
    for text in said:  # two for a key, the first state, the step
        (programs,) = re.findall(r"^compiled: (.*)$", text, re.MULTILINE)
        assert len(programs.split()) <= 4, programs


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        ("OSError(errno.EIO, 'x')", 1),
        ("ConnectionResetError('of a moment')", 1),
        ("TimeoutError(errno.ETIMEDOUT, 'x')", 1),
        ("PermissionError(errno.EACCES, 'x')", 2),
        ("FileNotFoundError('an object')", 2),
        ("OSError('Forbidden: b/bucket')", 2),
        ("ValueError('x')", 2),
    ],
)
def test_only_what_may_pass_is_worth_another_try(raised, code):
    """Launchers start a command that exits with 1 again, and leave 2 to a person."""
    text = (
        "import errno\n"
        "from supmim_jax import cli, errors\n"
        "def run():\n"
        f"    try: raise {raised}\n"
        "    except Exception as error: raise errors.SetupError(f'no: {error}') from None\n"
        "cli.start(run)"
    )
    out = subprocess.run(
        [sys.executable, "-c", text], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert out.returncode == code and "Traceback" not in out.stderr
