"""What a run notes about where it was trained."""

import json
import subprocess

import jax
import pytest
from etils import epath

from supmim_jax import environment, run_directory, sharding, train
from supmim_jax.config import SetupError


def test_it_names_versions_devices_and_processes():
    found = environment.collect(jax.devices())
    assert found["devices"] == "8 x cpu" and found["hosts"] == 1 and found["CPUs per host"] > 0
    assert found["jax"] == jax.__version__ and found["python"].startswith("3.")
    assert json.loads(json.dumps(found)) == found


def test_the_commit_is_that_of_a_tracked_file_and_tells_of_changes(tmp_path, monkeypatch):
    file, stranger = tmp_path / "package" / "module.py", tmp_path / "package" / "other.py"
    file.parent.mkdir()
    file.write_text("1")
    assert environment.commit(file) == ""

    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e")
        command = ("git", "-C", str(tmp_path), *identity, *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD")
    assert environment.commit(file) == head
    file.write_text("2")
    assert environment.commit(file) == f"{head} with changes"
    assert environment.commit(stranger) == ""
    monkeypatch.setenv("PATH", "")
    assert environment.commit(file) == ""


def test_parts_are_noted_where_the_environment_changes_and_no_later():
    a, b = {"jax": "1", "date": "monday"}, {"jax": "2", "date": "tuesday"}
    first = environment.continued([], 0, a)
    assert first == [{"from_step": 0, **a}]
    assert environment.continued(first, 5, a | {"date": "friday"}) == first
    second = environment.continued(first, 5, b)
    assert second == [*first, {"from_step": 5, **b}]
    assert environment.continued(second, 3, a) == first  # the steps from 3 on are done again
    assert environment.continued(second, 0, b) == [{"from_step": 0, **b}]


def test_training_notes_what_it_runs_on(cfg, tmp_path):
    train.train(cfg, tmp_path, stop_at=1, devices=jax.devices()[:1])
    mesh = sharding.make_mesh(cfg.mesh, jax.devices()[:2])
    run_directory.record_environment(epath.Path(tmp_path), 1, mesh)
    parts = json.loads((tmp_path / "environment.json").read_text())
    found = [(part["from_step"], part["devices"]) for part in parts]
    assert found == [(0, "1 x cpu"), (1, "2 x cpu")]
    (tmp_path / "environment.json").write_text("[")
    with pytest.raises(SetupError, match=r"environment\.json cannot be read.*Remove it"):
        run_directory.record_environment(epath.Path(tmp_path), 1, mesh)
