"""Workers that decode: their shared memory is looked at first, and a death is explained."""

import dataclasses
import multiprocessing
import os
import signal

import pytest

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
    judge = dataclasses.replace(cfg.eval, **evaluation)
    data = dataclasses.replace(cfg.data, workers=workers)
    return dataclasses.replace(cfg, data=data, eval=judge)


def test_shared_memory_that_is_too_small_is_told_before_a_worker_starts(cfg, monkeypatch):
    roomy(monkeypatch, 100_000)
    monkeypatch.setattr(worker, "keep_light", lambda: pytest.fail("it went on"))
    for asked in (busy(cfg, 2), busy(cfg, 1, batch_size=2048)):
        with pytest.raises(SetupError, match=r"data\.workers is \d.*/dev/shm.*0\.1 MB.*shm-size"):
            Dataset.open(asked).train_on_host(range(cfg.batch_size))
    with pytest.raises(SetupError, match=r"/dev/shm"):
        Dataset(busy(cfg, 1)).once_on_host(
            cfg.data.eval_split, range(64), transforms.EvalExample(busy(cfg, 1).data)
        )


def test_an_evaluation_among_the_steps_needs_its_room_beside_theirs(cfg, monkeypatch):
    roomy(monkeypatch, 300_000)
    Dataset.open(busy(cfg)).train_on_host(range(cfg.batch_size)).close()
    with pytest.raises(SetupError, match="/dev/shm"):
        Dataset.open(busy(cfg, every=4)).train_on_host(range(cfg.batch_size))


@pytest.mark.parametrize(
    ("number", "error", "said"),
    [
        (signal.SIGBUS, SetupError, "/dev/shm"),
        (signal.SIGKILL, ChildProcessError, "memory"),
        (signal.SIGSEGV, ChildProcessError, "SIGSEGV"),
    ],
)
def test_a_worker_that_dies_is_explained(number, error, said, cfg):
    batches = Dataset.open(busy(cfg)).train_on_host(range(cfg.batch_size))
    next(batches)
    (child,) = multiprocessing.active_children()
    os.kill(child.pid, number)
    with pytest.raises(error, match=said):
        for _ in batches:
            pass
    batches.close()
