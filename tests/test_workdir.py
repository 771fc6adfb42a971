"""Who may write a workdir, and what happens to a run when it cannot, or the clock jumps."""

import errno
import fcntl
import subprocess
import time

import pytest
from conftest import ONE, final_state, same
from etils import epath

from supmim_jax import checkpoint, multihost
from supmim_jax.config import WatchConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.tokenizers import Frozen
from supmim_jax.train import train
from supmim_jax.workdir import Workdir

pytestmark = pytest.mark.usefixtures("build_once")

NOTHING = Frozen({}, "")


def test_a_second_run_on_one_workdir_is_refused(cfg, tmp_path):
    train(cfg, tmp_path, stop_at=2, devices=ONE)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with Workdir.open(tmp_path, cfg).claimed(NOTHING):
        with pytest.raises(SetupError, match=r"belongs to a run that goes on: process \d+ on "):
            train(cfg, tmp_path, devices=ONE)
        again = Workdir(epath.Path(tmp_path), cfg).claimed(NOTHING)
        with pytest.raises(SetupError, match="belongs to a run that goes on"), again:
            pass
    del before[tmp_path / "lock"]
    assert all(p.read_bytes() == text for p, text in before.items())
    train(cfg, tmp_path, stop_at=3, devices=ONE)


def test_a_run_that_began_meanwhile_is_not_gone_on_with(cfg, tmp_path):
    train(cfg, tmp_path, stop_at=2, devices=ONE)
    other = changed(cfg, seed=1)
    taken = Workdir(epath.Path(tmp_path), other).claimed(NOTHING)
    with pytest.raises(SetupError, match=r"another config: config\.seed"), taken:
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_trained_on(cfg, tmp_path, monkeypatch, number):
    def without(*_):
        raise OSError(number, "none here")

    monkeypatch.setattr(fcntl, "flock", without)
    for _ in range(2):
        Workdir.open(tmp_path, cfg)
        with Workdir.open(tmp_path, cfg).claimed(NOTHING):
            pass


@pytest.fixture
def mounted(tmp_path):
    """A file system of 64 MB that can be made read-only."""
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "supmim_jax", str(tmp_path)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def test_a_workdir_that_is_read_only_is_named(cfg, mounted):
    train(cfg, mounted / "run", stop_at=2, devices=ONE)
    subprocess.run(["mount", "-o", "remount,ro", str(mounted)], check=True)
    with pytest.raises(SetupError, match=r"run cannot be written: .*Read-only file system"):
        train(cfg, mounted / "run", devices=ONE)


def test_a_clock_that_jumps_changes_nothing(cfg, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole, devices=ONE)
    now, wall = time.time, [0.0]
    monkeypatch.setattr(time, "time", lambda: now() + wall[0])
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    for stop_at, wall[0] in ((5, 3e8), (9, -9e8), (None, 0.0)):
        results = train(cfg, parts, stop_at=stop_at, devices=ONE)
    assert same(*(final_state(cfg, d)[0] for d in (whole, parts)))
    assert 0 < results["seconds"] < 600


def test_a_save_that_takes_long_is_no_stall(cfg, tmp_path, monkeypatch):
    ended, waiting = [], checkpoint.Checkpoints.wait
    monkeypatch.setattr(multihost, "leave", lambda *said: ended.append(said))
    watch = WatchConfig(stall_seconds=0.3, stall_factor=1.0)
    monkeypatch.setattr(
        checkpoint.Checkpoints, "wait", lambda self: (time.sleep(0.9), waiting(self))
    )
    train(changed(cfg, watch=watch), tmp_path, stop_at=6, devices=ONE)
    assert ended == []
