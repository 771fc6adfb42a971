"""A fault of what shows a command's output ends no work and loses none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY

COMMAND = """
import os, sys
from absl import logging
from supmim_jax import cli
from supmim_jax.data.prepare import output

def run():
    with open(os.environ["DONE"], "w") as file:
        for text in ("shown", "übergroß", "\\udcff", "x" * 10000):
            print(text)
            print(text, file=sys.stderr, flush=True)
            logging.error("%s", text)
            with output.progress("bar", 2, "images") as shown:
                shown.update()
        sys.stdout.flush()
        file.write(f"done {file.fileno() > 2}")

cli.start(run)
"""


def shell(redirection: str, *command: str, **env) -> int:
    """The exit code of a command whose output goes nowhere that it could."""
    # The reader has gone before the command begins, and the shell has the command's code.
    text = f'"$@" {redirection}; code=$?' if "|" not in redirection else f'"$@" {redirection}'
    text += '; exit "${code:-${PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", text, "bash", sys.executable, *command],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": REPOSITORY} | env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.returncode


FAULTS = ["2>&-", ">&-", ">&- 2>&- <&-", "2>/dev/full", "2>&1 | true", "| true"]


@pytest.mark.parametrize("fault", FAULTS)
def test_output_that_goes_nowhere(fault, tmp_path):
    done = tmp_path / "done"
    assert shell(fault, "-c", COMMAND, DONE=str(done)) == 0
    assert done.read_text() == "done True"


@pytest.mark.parametrize("command", ["probe", "bench"])
def test_help_is_no_failure_in_a_pipe_that_closed_either(command):
    assert shell("| true", "-m", f"supmim_jax.{command}", "--help") == 0


def test_output_in_an_encoding_that_lacks_letters(tmp_path):
    done = tmp_path / "done"
    assert shell("", "-c", COMMAND, DONE=str(done), PYTHONIOENCODING="ascii:strict") == 0
    assert done.read_text() == "done True"


def test_a_result_that_a_full_disk_cut_off_is_no_success(tmp_path):
    done = tmp_path / "done"
    assert shell(">/dev/full", "-c", COMMAND, DONE=str(done)) == 2
    assert done.read_text() == "done True"


@pytest.mark.parametrize("fault", ["2>&1 | true", pytest.param("2>&-", marks=pytest.mark.slow)])
def test_a_run_that_nobody_sees_ends_and_has_its_results(fault, data_dir, tmp_path):
    run = ["-m", "supmim_jax.train", "--config=configs/debug_supervised.py", "--config.epochs=1"]
    run += ["--config.model.width=16", "--config.model.depth=1", "--config.eval.which=('top1',)"]
    run += [f"--config.data.data_dir={data_dir}", f"--workdir={tmp_path}", "--config.log.every=1"]
    assert shell(fault, *run) == 0
    assert "top1" in json.loads(Path(tmp_path, "results.json").read_text())


def test_a_picture_is_drawn_whatever_backend_a_notebook_left(initial, tmp_path):
    picture = tmp_path / "picture.png"
    command = ["-m", "supmim_jax.visualize", f"--checkpoint={initial}", f"--out={picture}"]
    assert shell("", *command, MPLBACKEND="nonsense") == 0
    assert picture.stat().st_size > 5000
