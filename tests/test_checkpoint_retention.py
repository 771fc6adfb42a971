"""Which checkpoints stay, and what happens when the disk is full."""

import json
import shutil
import subprocess
import time

import jax
import numpy as np
import pytest

from supmim_jax import checkpoint
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import save as save_module
from supmim_jax.config import (
    CheckpointConfig,
    Config,
    EvalConfig,
    SupervisedConfig,
)
from supmim_jax.errors import SetupError

RULES = CheckpointConfig(every=1, keep=2, keep_every=4, keep_best="knn")
CFG = Config(
    batch_size=16,
    eval=EvalConfig(every=1),
    objective=SupervisedConfig(),
    checkpoint=RULES,
)


def small(step: int, size: int = 8) -> TrainState:
    """A state of another number in each step, on one device."""
    arrays = {"w": np.random.default_rng(step).normal(size=size).astype(np.float32)}
    put = jax.device_put({"step": np.int32(step), "w": arrays["w"]}, jax.devices()[0])
    return TrainState(step=put["step"], params={"w": put["w"]}, opt_state={}, moving={})


def save(checkpoints, step: int, size: int = 8) -> None:
    checkpoints.save(small(step, size), CFG, checkpoint.BEGIN | {"position": 16 * step})


def like(size: int) -> TrainState:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), small(0, size)
    )


def test_the_newest_the_multiples_and_the_best_stay_also_after_a_restart(tmp_path):
    knn = {1: 50.0, 2: 70.0, 3: 60.0, 4: float("nan"), 5: 10.0, 6: 70.0, 7: 1.0, 8: 2.0, 9: 3.0}
    kept = []
    checkpoints = checkpoint.Checkpoints(tmp_path, RULES)
    for step, value in knn.items():
        if step == 8:  # another process of the run
            checkpoints.close()
            checkpoints = checkpoint.Checkpoints(tmp_path, RULES)
        save(checkpoints, step)
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
            file.write(json.dumps({"step": step, "eval/top1": 1.0, "eval/knn": value}) + "\n")
            file.write('{"step": 3, "eval/kn' if step == 9 else "")
        checkpoints.best.measured(step, {"top1": 1.0, "knn": value})
        checkpoints.wait()
        kept.append(checkpoint.steps(tmp_path))
    checkpoints.close()
    assert kept[2] == [2, 3] and kept[4] == [2, 4, 5]
    assert kept[5] == [2, 4, 5, 6]  # 6 was not known to be as good when it was saved
    assert kept[6] == [4, 6, 7] and kept[8] == [4, 6, 8, 9]
    assert checkpoint.locate(f"{tmp_path}@best").name == "6"
    assert checkpoint.locate(f"{tmp_path}@4").name == "4"


def test_only_the_newest_stay_where_nothing_else_is_asked(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig(keep=1))
    for step in (1, 2, 3):
        save(checkpoints, step)
        checkpoints.best.measured(step, {})
    checkpoints.close()
    assert checkpoint.steps(tmp_path) == [3]
    with pytest.raises(SetupError, match=r"best: none of them was evaluated for 'knn'.*has 3"):
        checkpoint.locate(f"{tmp_path}@best")


def test_a_best_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(SetupError, match="'knn', but the evaluation gives top1, linear"):
        checkpoint.Checkpoints(tmp_path, RULES).best.measured(1, {"top1": 1.0, "linear": 2.0})


SIZE = 1 << 20  # numbers in the states on the small disk: 4 MiB


@pytest.fixture
def small_disk(tmp_path):
    """12 MB, holding a run with a checkpoint of step 1."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        checkpoints = checkpoint.Checkpoints(disk, CheckpointConfig(keep=1))
        save(checkpoints, 1, SIZE)
        checkpoints.wait()
        yield disk, checkpoints
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def fill(disk, left: int) -> None:
    (disk / "filler").write_bytes(b"\1" * (shutil.disk_usage(disk).free - left))


def still_there(disk) -> bool:
    """Whether the first checkpoint is whole, and the only one."""
    again = checkpoint.Checkpoints(disk, CheckpointConfig(keep=1))
    state = again.newest().restore_state(like(SIZE))
    return checkpoint.steps(disk) == [1] and bool(
        (state.params["w"] == small(1, SIZE).params["w"]).all()
    )


def test_a_disk_without_room_is_found_before_anything_is_written(small_disk):
    disk, checkpoints = small_disk
    checkpoints.check_disk_space(like(SIZE))
    fill(disk, left=4 << 20)
    free, wanted = (
        shutil.disk_usage(disk).free,
        save_module.bytes_on_disk([np.zeros(SIZE, np.float32), np.int32(0)]),
    )
    for attempt in (
        lambda: checkpoints.check_disk_space(like(SIZE)),
        lambda: save(checkpoints, 2, SIZE),
    ):
        with pytest.raises(SetupError) as error:
            attempt()
        for text in (f"{disk}/checkpoints has no room", f"{free} bytes", f"{wanted} bytes"):
            assert text in str(error.value)
        assert "step 1, is intact. Free some room" in str(error.value)
    assert still_there(disk)
    (disk / "filler").unlink()
    save(checkpoints, 2, SIZE)  # the same process could go on
    checkpoints.close()
    assert checkpoint.steps(disk) == [2]


def checked(checkpoints) -> None:
    """As training does after every step."""
    for _ in range(300):
        checkpoints.check()
        time.sleep(0.05)


NOTICING = {
    "check": checked,
    "save": lambda checkpoints: save(checkpoints, 3, SIZE),
    "close": lambda checkpoints: checkpoints.close(),
}


@pytest.mark.parametrize("noticed_by", NOTICING)
def test_a_disk_that_fills_up_during_a_save_is_told_at_the_next_step(small_disk, noticed_by):
    disk, checkpoints = small_disk
    asking = checkpoint.Checkpoints.check_disk_space

    def asked_too_early(*args):
        asking(*args)
        fill(disk, left=1 << 20)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "check_disk_space", asked_too_early)
        save(checkpoints, 2, SIZE)
        with pytest.raises(SetupError, match=r"checkpoints/2 could not be saved \(") as error:
            NOTICING[noticed_by](checkpoints)
    assert "[Errno 28] No space left on device" in str(error.value)
    assert "The one before it, step 1, is intact." in str(error.value)
    (disk / "filler").unlink()
    assert still_there(disk)


def test_a_directory_that_may_not_be_written_is_told(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
    save(checkpoints, 1)
    checkpoints.wait()
    shutil.move(tmp_path / "checkpoints", tmp_path / "moved")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(SetupError, match=r"could not be saved \(.*See to the room and the permi"):
        save(checkpoints, 2)
        checkpoints.wait()


def test_what_a_run_goes_back_to_stays_however_often_it_is_told_to_stop(tmp_path):
    rules = CheckpointConfig(every=4, keep=1)
    checkpoints = checkpoint.Checkpoints(tmp_path, rules)
    for step in (4, 5, 6, 7):
        save(checkpoints, step)
        checkpoints.wait()
    assert checkpoint.steps(tmp_path) == [4, 7]
    checkpoints._remove(7)  # and is killed
    checkpoints = checkpoint.Checkpoints(tmp_path, rules)
    assert checkpoints.latest() == 4
    for step in (5, 6):
        save(checkpoints, step)
    assert checkpoints.back_to_scheduled() == 4 == checkpoints.latest()
    save(checkpoints, 5)  # again
    checkpoints.close()
    assert sorted(x.name for x in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    # Of another schedule, the oldest; none before its first.
    other = checkpoint.Checkpoints(tmp_path, CheckpointConfig(every=3, keep=1))
    assert other.back_to_scheduled() == 4 and checkpoint.steps(tmp_path) == [4]
    early = checkpoint.Checkpoints(tmp_path, CheckpointConfig(every=9, keep=1))
    assert early.back_to_scheduled() == 0 and checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "full"), SetupError),
        (OSError(5, "once"), OSError),
        (ValueError("TensorStore: ... [os_error_code='122' ...]"), SetupError),
        (RuntimeError("a barrier"), RuntimeError),
    ],
)
def test_only_what_comes_again_is_for_the_user_to_mend(tmp_path, error, told):
    checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointConfig())
    with pytest.raises(told), checkpoints._explained("saved"):
        raise error
