"""The scripts, with a recording stand-in for python."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY


@pytest.fixture
def clone(tmp_path):
    """A copy of the scripts in a directory with a space in its name, and its active environment."""
    root = tmp_path / "a clone"
    root.mkdir()
    for name in ("launch", "tests/run.sh", "setup.py", "constraints.txt"):
        source, target = Path(REPOSITORY, name), root / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    environment = tmp_path / "environment"
    (environment / "bin").mkdir(parents=True)
    for name in ("python", "ruff"):
        stand_in = environment / "bin" / name
        stand_in.write_text(f'#!/bin/bash\necho "{name} $*" >> "{tmp_path}/calls"\n')
        stand_in.chmod(0o755)
    return root, environment


def calls(clone, script: str, *arguments: str, **env) -> list[str]:
    """What a script runs, from another working directory."""
    root, environment = clone
    log = root.parent / "calls"
    log.unlink(missing_ok=True)
    path = f"{environment / 'bin'}:{os.environ['PATH']}"
    subprocess.run(
        ["bash", str(root / script), *arguments],
        check=True,
        cwd=root.parent,
        env=os.environ | {"PATH": path, "VIRTUAL_ENV": str(environment)} | env,
    )
    found = log.read_text().splitlines()
    assert found[0].startswith("python -c import sys")  # is it new enough?
    return found[1:]


def test_local_installs_once_trains_both_and_compares_them(clone):
    first, again = calls(clone, "launch/local.sh"), calls(clone, "launch/local.sh")
    assert "-m pip install" in first[0] and "--constraint constraints.txt" in first[0]
    out = f"{clone[0]}/runs/local"
    assert f"--config configs/debug_supervised.py --workdir {out}/supervised" in first[1]
    assert f"--config configs/debug.py --workdir {out}/supmim" in first[2]
    assert first[3].startswith("python -m supmim_jax.probe --split test")
    assert again == first[1:]
    elsewhere = calls(clone, "launch/local.sh", "results here")
    assert f"--workdir {clone[0].parent}/results here/supervised" in elsewhere[0]
    with (clone[0] / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert calls(clone, "launch/local.sh") == first


def test_the_tests_install_their_extras_and_check_style_first(clone):
    found = calls(clone, "tests/run.sh", EXTRAS="test,parity")
    assert ".[test,parity]" in found[0]
    assert found[1:] == ["ruff check .", "ruff format --check .", "python -m pytest -rs"]


def test_an_old_python_is_refused(clone):
    root, environment = clone
    (environment / "bin" / "python").write_text("#!/bin/bash\necho 3.9; exit 1\n")
    env = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX")}
    out = subprocess.run(
        ["bash", str(root / "launch/local.sh")],
        capture_output=True,
        text=True,
        env=env | {"PYTHON": str(environment / "bin" / "python")},
    )
    assert out.returncode == 2 and "needs Python 3.11 or newer" in out.stderr
    assert not (root / ".venv").exists()
