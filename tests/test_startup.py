"""The time from a command to its first step is said, and a second start finds compiled programs."""

import re

import pytest
from conftest import python, train_command

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
    out = python("-c", program)
    assert 0.3 < float(out.stdout) < 600  # an upper bound that no load reaches


def test_without_proc_it_counts_from_the_import(monkeypatch):
    def gone(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(metrics.Path, "read_text", gone)
    monkeypatch.setattr(metrics, "IMPORTED", metrics.time.perf_counter() - 1000)
    assert 1000 <= metrics.seconds_since_start() < 1600


def test_a_run_keeps_its_programs_and_says_when_it_begins(tmp_path, data_dir):
    compiled = tmp_path / "compiled"
    flags = "--config.eval.which=('top1',)", "--config.model.width=16", "--config.epochs=1"

    def run(name: str) -> str:
        _, _, *command = train_command(tmp_path / name, data_dir, *flags, config="debug")
        out = python("-c", PROGRAM, *command, JAX_COMPILATION_CACHE_DIR=str(compiled))
        assert out.returncode == 0, out.stderr
        return out.stderr

    said = [run(name) for name in ("cold", "warm")]
    entries = {path.name for path in compiled.glob("jit_step*-cache")}
    assert len(entries) == 1  # the second run added none
    for text in said:
        assert len(re.findall(r"Step 1 is done \d+\.\d s after this process began\.\n", text)) == 1
        # Two for a key, the first state, the step.
        (programs,) = re.findall(r"^compiled: (.*)$", text, re.MULTILINE)
        assert len(programs.split()) <= 4, programs


ENDED = """
import errno, os, sys
from supmim_jax import cli, errors

def told():
    try:
        raise eval(raised)
    except Exception as error:
        raise errors.SetupError(f"no: {error}") from None

def not_told():
    raise eval(raised)

_, how, *cases = sys.argv
sys.argv[1:] = []
for raised in cases:
    if not os.fork():
        cli.start({"told": told, "not told": not_told}[how])
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


@pytest.mark.parametrize(
    ("how", "codes"),
    [
        (
            "told",
            {
                "OSError(errno.EIO, 'x')": 1,
                "ConnectionResetError('of a moment')": 1,
                "TimeoutError(errno.ETIMEDOUT, 'x')": 1,
                "PermissionError(errno.EACCES, 'x')": 2,
                "FileNotFoundError('an object')": 2,
                "OSError('Forbidden: b/bucket')": 2,
                "ValueError('x')": 2,
            },
        ),
        ("not told", {f"OSError({x}, 'why', 'file')": y for x, y in ((28, 2), (30, 2), (5, 1))}),
    ],
)
def test_only_what_may_pass_is_worth_another_try(how, codes):
    """Launchers start a command that exits with 1 again, and leave 2 to a person."""
    out = python("-c", ENDED, how, *codes)
    assert dict(zip(codes, map(int, out.stdout.split()), strict=True)) == codes
    assert out.stderr.count("Traceback") == (how == "not told")  # of the I/O error alone
    assert how == "told" or out.stderr.count("why: 'file'") >= len(codes)
