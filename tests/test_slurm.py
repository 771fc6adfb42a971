"""launch/slurm.sbatch on a real Slurm, which tests/slurm/setup.sh makes of this machine."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FAST, REPOSITORY
from test_processes import wait_for

from supmim_jax import checkpoint
from supmim_jax.data import fractals

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm():
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("needs root and apt-get, to install and start Slurm")
    setup = ["bash", f"{REPOSITORY}/tests/slurm/setup.sh"]
    subprocess.run(setup, check=True)
    yield
    subprocess.run([*setup, "stop"], check=True)


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """An active environment, so that the script makes none; it has what this Python has."""
    bin = tmp_path / "environment" / "bin"
    bin.mkdir(parents=True)
    stand_in = bin / "python"
    stand_in.write_text(f'#!/bin/bash\n[ "$2" = pip ] || exec {sys.executable} "$@"\n')
    stand_in.chmod(0o755)
    return os.environ | {
        "PATH": f"{bin}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(bin.parent),
        "JAX_NUM_CPU_DEVICES": "1",
        "XLA_FLAGS": FAST,
        "EXTRAS": "",
    }


def submit(
    environment, tmp_path, *arguments: str, wait: bool = True
) -> subprocess.CompletedProcess:
    options = ["--gres=none", "--ntasks-per-node=2", "--cpus-per-task=1", "--parsable"]
    return subprocess.run(
        [
            *("sbatch", *["--wait"][: int(wait)], *options, f"--output={tmp_path}/out"),
            *("launch/slurm.sbatch", "--config", "configs/debug_supervised.py"),
            *("--workdir", f"{tmp_path}/run", "--config.model.depth=1", *arguments),
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_two_tasks_train_as_one_run(slurm, environment, data_dir, tmp_path):
    fractals.prepare("tiny", data_dir)
    data = f"--config.data.data_dir={data_dir}"
    job = submit(environment, tmp_path, data, "--config.epochs=0.4")
    out = (tmp_path / "out").read_text()
    assert job.returncode == 0, out
    assert "knn" in json.loads((tmp_path / "run" / "results.json").read_text())
    (part,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert part["hosts"] == 2 and part["devices"] == "2 x cpu"
    assert "2 processes: 0 on" in out and out.count('"knn"') == 1


def test_a_mistake_ends_the_job_and_is_not_queued_again(slurm, environment, data_dir, tmp_path):
    job = submit(environment, tmp_path, "--config.batch_size=63")
    out = (tmp_path / "out").read_text()
    assert job.returncode == 2 and "batch shards" in out and "queued again" not in out


def test_a_preempted_job_saves_is_queued_again_and_goes_on(slurm, environment, data_dir, tmp_path):
    """As Slurm does it: SIGTERM to the script, here by hand."""
    fractals.prepare("tiny", data_dir)
    more = [f"--config.data.data_dir={data_dir}", "--config.epochs=9999", "--config.log.every=1"]
    job = submit(environment, tmp_path, *more, wait=False).stdout.strip()
    metrics, out = tmp_path / "run" / "metrics.jsonl", tmp_path / "out"
    try:
        wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") > 3)
        subprocess.run(["scancel", "--batch", "--signal=TERM", job], check=True)
        wait_for(lambda: "queued again" in out.read_text())
        assert "Stopped by SIGTERM" in out.read_text()
        (step,) = checkpoint.steps(tmp_path / "run")
        # Slurm holds a job back for two minutes after it was queued again; once is enough here.
        state = ["squeue", "--noheader", "--format=%T", f"--job={job}"]
        wait_for(lambda: "PENDING" in subprocess.check_output(state, text=True))
    finally:
        subprocess.run(["scancel", job], check=True)
    log = Path(out).read_text()
    assert step > 3 and log.count("processes: 0 on") == 1
