"""What a run does about NaN: it ends, or goes back and leaves the batches out."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import ONE, final_state, same

from supmim_jax.config import WatchConfig
from supmim_jax.data import loader
from supmim_jax.data.loader import Dataset
from supmim_jax.train import train
from supmim_jax.watchdog import Diverged

pytestmark = pytest.mark.usefixtures("build_once")


@pytest.fixture
def poison(cfg, one_device, monkeypatch):
    """Numbers of batches that give NaN whenever they come, and those that came."""
    longer = dataclasses.replace(cfg, epochs=6)
    batches = Dataset.open(longer).train(one_device)
    order = {bytes(np.asarray(batch.id)): n for n, batch in enumerate(batches, 1)}
    batches.close()
    poisonous, came = set(), []
    following = loader.Training.__next__

    def taken(batches):
        batch = following(batches)
        came.append(order[bytes(np.asarray(batch.id))])
        if came[-1] in poisonous:
            batch = dataclasses.replace(batch, weight=batch.weight * np.nan)
        return batch

    monkeypatch.setattr(loader.Training, "__next__", taken)
    return poisonous, came


def going_back(cfg, times: int):
    return dataclasses.replace(cfg, watch=WatchConfig(roll_backs=times))


def test_a_run_goes_back_once_and_leaves_the_batches_out(cfg, poison, tmp_path, capsys):
    poisonous, came = poison
    poisonous.add(7)
    cfg = going_back(cfg, 1)  # checkpoints after 4 and 8
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train(cfg, whole, devices=ONE)
    # 8 was begun before step 7 was seen to be NaN; 5 to 7 are left out, and 12 steps are done.
    assert came == [1, 2, 3, 4, 5, 6, 7, 8, *range(8, 16)]
    assert results["skipped_batches"] == 3
    lines = [json.loads(x) for x in (whole / "metrics.jsonl").read_text().splitlines()]
    noted = [x for x in lines if "rolled_back_from" in x]
    assert noted == [{"step": 4, "rolled_back_from": 7, "skipped_batches": 3, "roll_backs": 1}]
    assert [x["skipped_batches"] for x in lines if x["step"] > 4 and "loss" in x] == [3] * 4
    assert "Going back to step 4" in capsys.readouterr().err
    # Ended before NaN and after it went back, which saves there too: the same end.
    for stop_at in (6, 9, None):
        train(cfg, parts, stop_at=stop_at, devices=ONE)
    (a, run), (b, other) = (final_state(cfg, d) for d in (whole, parts))
    assert same(a, b)
    assert run["position"] == other["position"] == 15 * 16


def test_a_run_goes_back_no_more_often_than_it_may(cfg, poison, tmp_path):
    poisonous, came = poison
    poisonous |= {2, 9}
    with pytest.raises(Diverged, match=r"Step 2 is not finite"):
        train(cfg, tmp_path / "stops", devices=ONE)
    came.clear()
    with pytest.raises(Diverged, match=r"Step 7 is not finite: .*It went back 1 times before"):
        train(going_back(cfg, 1), tmp_path / "once", devices=ONE)
    assert came == [1, 2, *range(3, 11)]
    # Allowed once more it goes on, from the checkpoint after 4 steps, the last good one.
    came.clear()
    train(going_back(cfg, 2), tmp_path / "once", devices=ONE)
    assert came == [7, 8, 9, 10, *range(10, 18)]
