"""Workers that decode: their shared memory is looked at first, and a death is explained."""

import multiprocessing
import os
import signal

import pytest

from supmim_jax.config import changed
from supmim_jax.data import transforms, worker
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError


def roomy(monkeypatch, free: float) -> None:
    """As if /dev/shm had so many bytes."""

    class Found:
        f_frsize, f_bavail, f_blocks = 1, free, 2 * free

    real = os.statvfs
    monkeypatch.setattr(os, "statvfs", lambda path: Found if path == "/dev/shm" else real(path))


def busy(cfg, workers: int = 1, **evaluation):
    return changed(cfg, data={"workers": workers}, eval=evaluation)


def test_shared_memory_that_is_too_small_is_told_before_a_worker_starts(cfg, monkeypatch):
    roomy(monkeypatch, 100_000)
    monkeypatch.setattr(worker, "keep_light", lambda: pytest.fail("it went on"))
    one, make = busy(cfg), transforms.EvalExample(cfg.data)
    for start in (
        lambda: Dataset(busy(cfg, 2)).train_on_host(range(16)),
        lambda: Dataset(busy(cfg, batch_size=2048)).train_on_host(range(16)),
        lambda: Dataset(one).once_on_host("validation", range(64), make),
    ):
        with pytest.raises(SetupError, match=r"data\.workers is \d.*/dev/shm.*0\.1 MB.*shm-size"):
            start()


def test_an_evaluation_among_the_steps_needs_its_room_beside_theirs(cfg, monkeypatch):
    roomy(monkeypatch, 300_000)
    Dataset(busy(cfg)).train_on_host(range(16)).close()
    with pytest.raises(SetupError, match="/dev/shm"):
        Dataset(busy(cfg, every=4)).train_on_host(range(16))


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGBUS, SetupError, "/dev/shm"),
        (signal.SIGKILL, ChildProcessError, "memory"),
        (signal.SIGSEGV, ChildProcessError, "SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_explained(number, error, said, cfg):
    batches = Dataset(busy(cfg)).train_on_host(range(16))
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, number)
    with pytest.raises(error, match=said):
        for _ in batches:
            pass
    batches.close()
