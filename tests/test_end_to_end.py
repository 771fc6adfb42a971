"""Whole runs: resume, commands, and what a person sees when something is wrong."""

import json
import shutil
import threading
import time
import weakref

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ONE, final_state, metric_lines, python, same, train_command
from etils import epath

from supmim_jax import checkpoint, evals, init_from, probe, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import CheckpointConfig, InitConfig, changed
from supmim_jax.config.configdict import from_configdict
from supmim_jax.data import fractals, loader
from supmim_jax.errors import SetupError
from supmim_jax.metrics import MetricsWriter
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep
from supmim_jax.watchdog import Diverged

pytestmark = pytest.mark.usefixtures("build_once")


def test_an_interrupted_run_ends_bit_for_bit_like_an_uninterrupted_one(cfg, tmp_path):
    cfg = changed(cfg, eval={"every": 3})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    results = train(cfg, whole, devices=ONE)
    for stop_at in (3, 7, None):
        resumed = train(cfg, parts, stop_at=stop_at, devices=ONE)
    (a, run), (b, other) = (final_state(cfg, d) for d in (whole, parts))
    assert same(a, b)
    assert run["position"] == other["position"] == 12 * 16 and run["seconds"] > 0
    assert (results["top1"], results["knn"]) == (resumed["top1"], resumed["knn"])
    a, b = metric_lines(whole), metric_lines(parts)
    assert [x for x in b if x["step"] not in (3, 7) or "eval/top1" in x] == a
    assert [x["step"] for x in a if "eval/top1" in x] == [3, 6, 9, 12]
    assert json.loads((whole / "results.json").read_text()) == results
    assert train(cfg, whole, devices=ONE) == results
    with pytest.raises(SetupError, match=r"complete and was not judged by linear.*probe"):
        train(changed(cfg, eval={"which": (*cfg.eval.which, "linear")}), whole, devices=ONE)


def test_no_batch_is_kept_while_the_next_is_waited_for(cfg, tmp_path, monkeypatch):
    images, kept, asked = [], [], threading.Semaphore(0)
    following, decoded = loader.Training.__next__, loader.HostBatches.__next__

    def none_ahead(batches):  # so that the thread that places them always waits for the next
        asked.acquire()
        return decoded(batches)

    def taken(batches):
        deadline = time.monotonic() + 20
        while any(image() is not None for image in images) and time.monotonic() < deadline:
            time.sleep(0.01)
        kept.append(sum(image() is not None for image in images))
        asked.release(1 if len(kept) < 4 else 9)  # at the end the thread shall not wait
        batch = following(batches)
        images.append(weakref.ref(batch.views[0]))
        return batch

    monkeypatch.setattr(loader.Training, "__next__", taken)
    monkeypatch.setattr(loader.HostBatches, "__next__", none_ahead)
    train(cfg, tmp_path, stop_at=4, devices=ONE)
    assert kept == [0] * 4


def test_a_run_that_fails_ends_what_decodes(cfg, tmp_path, monkeypatch):
    ended = []
    closing = loader.Training.close
    monkeypatch.setattr(loader.Training, "close", lambda b: (closing(b), ended.append(1)))
    monkeypatch.setattr(MetricsWriter, "after_step", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(cfg, tmp_path, devices=ONE)
    assert ended == [1]


def test_metrics_after_the_checkpoint_are_rewritten_on_resume(cfg, tmp_path):
    train(cfg, tmp_path, stop_at=4, devices=ONE)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 1.0}\n{"step": 8, "lo')
    train(cfg, tmp_path, stop_at=6, devices=ONE)
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 4, 6]
    assert metric_lines(tmp_path)[-1]["loss"] != 1.0


def test_an_evaluation_that_was_done_is_not_repeated(cfg, tmp_path, monkeypatch):
    cfg = changed(cfg, eval={"every": 3})
    train(cfg, tmp_path, stop_at=4, devices=ONE)
    shutil.rmtree(tmp_path / "checkpoints" / "4")  # as if killed before it was complete
    monkeypatch.setattr(evals, "run_all", lambda *_: pytest.fail("it was done"))
    train(cfg, tmp_path, stop_at=5, devices=ONE)
    lines = metric_lines(tmp_path)
    assert [x["step"] for x in lines if "eval/top1" in x] == [3]
    assert [x["step"] for x in lines if "loss" in x] == [2, 4, 5]


def test_a_workdir_of_another_config_is_left_alone(cfg, tmp_path):
    train(cfg, tmp_path, stop_at=2, devices=ONE)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SetupError, match=r"another config: config\.seed: 0; 1 .*Choose another"):
        train(changed(cfg, seed=1), tmp_path, devices=ONE)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_run_goes_on_with_another_mesh_and_other_logging(cfg, tmp_path):
    train(cfg, tmp_path, stop_at=4, devices=ONE)
    train(changed(cfg, mesh={"fsdp": 2}, log={"every": 1}), tmp_path, 6, jax.devices()[:2])
    assert [line["step"] for line in metric_lines(tmp_path)] == [2, 4, 5, 6]
    assert final_state(cfg, tmp_path)[1]["position"] == 96
    assert probe.probe(Checkpoint.open(str(tmp_path))).mesh.size == 8


def test_a_tokenizer_that_cannot_be_fitted_leaves_nothing_behind(cfg, tmp_path):
    cfg = changed(cfg, objective={"target": {"codes": 60000}})
    with pytest.raises(SetupError, match="distinct patches"):
        train(cfg, tmp_path / "run", devices=ONE)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops_and_says_where(cfg, tmp_path):
    cfg = changed(cfg, optim={"lr": 1e30, "warmup_epochs": 0.0, "clip": 0.0})
    with pytest.raises(Diverged, match=r"Step \d+ is not finite: .*mim=.*Ids of its batch: \d+, "):
        train(cfg, tmp_path, devices=ONE)
    assert checkpoint.Checkpoints(tmp_path, cfg.checkpoint).latest() is None


def test_probe_and_picture_read_what_training_wrote(cfg, tmp_path):
    results = train(cfg, tmp_path, devices=ONE)
    row = probe.probe(Checkpoint.open(str(tmp_path))).row()
    assert row["encoder"] == "supmim" and row["epochs"] == "3"
    assert row["top-1 %"] == f"{results['top1']:.2f}" and row["kNN %"] == f"{results['knn']:.2f}"
    assert probe.probe(Checkpoint.open(f"{tmp_path}@8")).row()["epochs"] == "2"
    checkpoint = Checkpoint.open(str(tmp_path))
    restored = visualize.restore(checkpoint)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8)
    rows = visualize.panels(restored, images, jax.random.key(0))
    assert checkpoint.config == cfg and len(visualize.draw(rows)) > 5000
    image, tokens, masked, predicted = rows.values()
    hidden = (masked == 0).all(-1)
    assert 0.4 < hidden.mean() < 0.6 and (masked[~hidden] == image[~hidden]).all()
    assert (tokens[~hidden] == predicted[~hidden]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.objective.mask_ratio=75"], "config.objective.mask_ratio is 75.0; it must be"),
        (
            ["--config.objective.mask_raito=0.5"],
            """error: 'mask_raito' Did you mean "mask_ratio\"""",
        ),
        (["--config.objective.mask_ratio=much"], "mask_ratio"),
        (["--config.objective.target=pixels"], "--config.objective.target is a section: give one"),
        (["--config.batch_size=63"], "the 2 batch shards of the mesh"),
        (
            ["--config.data.name=imagenet2012", "--config.data.data_dir=/nowhere"],
            "python -m supmim_jax.data.prepare --name imagenet2012 --data_dir /nowhere",
        ),
        (["--config=configs/debug.py:dbug"], "argument 'dbug' is unknown"),
        (["--config.data.data_dir=/proc/here"], "Set config.data.data_dir"),
        (["--workdir=setup.py/run"], "setup.py/run cannot be written"),
        (["--workdir=s3://bucket/run"], "s3://bucket/run"),
        (["--distributed"], "--distributed found no TPU VM or Slurm job"),
        (["--confg=x"], "confg"),
        (["surplus"], "Unknown argument 'surplus'"),
    ],
)
def test_a_mistake_is_answered_by_a_paragraph_and_nothing_written(
    arguments, message, data_dir, tmp_path
):
    fractals.prepare("tiny", data_dir)  # or the lines of that are among the paragraph's
    command = train_command(tmp_path / "run", data_dir, *arguments, config="debug")
    out = python(*command, JAX_NUM_CPU_DEVICES="2")
    assert out.returncode == 2 and message in out.stderr
    assert "Traceback" not in out.stderr and out.stderr.count("error: ") == 1
    assert len(out.stderr.strip().splitlines()) <= 4
    assert list(tmp_path.iterdir()) == []


def test_training_from_the_command_line(data_dir, tmp_path):
    more = "--config.epochs=0.4", "--config.checkpoint.every=1"
    out = python(*train_command(tmp_path, data_dir, *more), JAX_NUM_CPU_DEVICES="2")
    assert out.returncode == 0, out.stderr
    saved = from_configdict(json.loads((tmp_path / "config.json").read_text()))
    assert (saved.epochs, saved.model.depth, saved.total_steps) == (0.4, 1, 2)
    assert "top1" in out.stdout and "supervised 2/2 100%" in out.stderr


def test_the_moving_average_of_the_parameters_is_what_is_judged_kept_and_brought_along(
    supervised, one_device, tmp_path
):
    plain, ema = supervised, changed(supervised, optim={"ema": 0.9})
    ways = {name: tmp_path / name for name in ("plain", "whole", "resumed")}
    train(plain, ways["plain"], devices=ONE)
    results = train(ema, ways["whole"], devices=ONE)
    train(ema, ways["resumed"], stop_at=6, devices=ONE)
    assert train(ema, ways["resumed"], devices=ONE)["knn"] == results["knn"]

    def state(name: str, step: int) -> dict:
        directory = epath.Path(ways[name]) / "checkpoints" / str(step) / "state"
        return ocp.PyTreeCheckpointer().restore(directory)

    found, without = state("whole", 12), state("plain", 12)
    jax.tree.map(np.testing.assert_array_equal, found["params"], without["params"])
    assert "ema" not in without
    # By hand, from the parameters after each step.
    ways["steps"] = tmp_path / "steps"
    train(changed(plain, checkpoint=CheckpointConfig(every=1, keep=99)), ways["steps"], devices=ONE)
    first = TrainStep.build(plain, one_device).init(jax.random.key(0)).params
    average = jax.tree.map(lambda x: np.asarray(x, np.float64), first)
    for step in range(1, 13):
        params = state("steps", step)["params"]
        average = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, average, params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found["ema"], average)
    probed = probe.probe(Checkpoint.open(str(ways["whole"])), devices=ONE)
    assert probed.results.metrics["knn"] == results["knn"]
    for location in (f"{ways['whole']}@ema", f"{ways['whole']}@8@ema"):
        assert checkpoint.locate(location).name in location + "@12"
    with pytest.raises(SetupError, match="plain@ema"):
        Checkpoint.open(f"{ways['plain']}@ema")
    tuned = changed(plain, init=InitConfig(checkpoint=str(ways["whole"])))
    built = TrainStep.build(tuned, one_device)
    begun = init_from.InitialState.open(tuned, built).make().params["encoder"]
    jax.tree.map(np.testing.assert_array_equal, begun, found["ema"]["encoder"])
