"""What an evaluation needs is looked at first; one that cannot be made leaves the others alone."""

import json

import pytest
from conftest import python, train_command

from supmim_jax import evals
from supmim_jax.config import MasksConfig, changed
from supmim_jax.data import source
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import evaluate


def judged(cfg, *which: str, shots: int = 2, **data):
    return changed(cfg, eval={"which": which, "few_shot": {"shots": shots}}, data=data)


def refused(cfg, *said: str) -> None:
    with pytest.raises(SetupError) as caught:
        evals.check(Dataset(cfg), cfg.data.eval_split)
    assert all(x in str(caught.value) for x in said), caught.value


def test_what_can_be_measured_is_let_through(cfg):
    """Of 64 images in turn of 30 classes, some have two and some three."""
    every = ("top1", "knn", "retrieval", "linear", "few_shot", "segmentation")
    masks = MasksConfig(field="segmentation", num_classes=31)
    evals.check(Dataset(judged(cfg, *every, masks=masks)), cfg.data.eval_split)


def test_too_few_images_of_a_class(cfg):
    refused(judged(cfg, "few_shot", shots=3), "few_shot.shots is 3", "class 4 has 2")
    refused(judged(cfg, "knn", "linear", train_split="train[:30]"), "linear", "train[:30]")
    refused(judged(cfg, "retrieval", eval_split="validation[:30]"), "retrieval", "validation[:30]")
    few = "train[:30]"  # one split to search and to learn from
    refused(judged(cfg, "knn", "retrieval", train_split=few, eval_split=few), "retrieval", few)


def test_a_large_split_is_not_counted_but_must_have_enough_in_all(cfg, monkeypatch):
    monkeypatch.setattr(evaluate, "COUNTED", 10)
    monkeypatch.setattr(evaluate, "GLANCE", 5)
    read = []
    record = source.Records.__getitem__
    monkeypatch.setattr(source.Records, "__getitem__", lambda *a: (read.append(1), record(*a))[1])
    evals.check(Dataset(judged(cfg, "few_shot", "linear", "retrieval")), cfg.data.eval_split)
    assert len(read) == 10
    refused(judged(cfg, "few_shot", shots=3), "few_shot.shots is 3", "64 examples of 30")


def test_no_masks_no_labels_and_no_examples(cfg, monkeypatch):
    refused(judged(cfg, "segmentation", masks=MasksConfig(field="label")), "masks.field", "label")
    refused(judged(cfg, "knn", eval_split="validation[:0]"), "validation[:0]")
    monkeypatch.setattr(source.Records, "__getitem__", lambda *_: {"label": -1})
    for name in ("knn", "few_shot", "retrieval"):
        refused(judged(cfg, name), "-1", cfg.data.eval_split)


SKIPPED = """
import runpy
from supmim_jax import evals
evals.check = lambda *_: None
runpy.run_module("supmim_jax.train", run_name="__main__")
"""


def test_the_others_are_written_and_the_command_measures_again_once_it_can(data_dir, tmp_path):
    """As in a data set that is too large to be looked through first."""
    run = ["--config.epochs=1", "--config.batch_size=16", "--config.model.width=16"]
    run += ["--config.data.train_split=train[:64]", "--config.data.train_examples=64"]
    run += ["--config.eval.which=('few_shot','knn','linear')"]
    run = train_command(tmp_path, data_dir, *run, "--config.eval.linear.strengths=(1.0,)")
    first = python("-c", SKIPPED, *run[2:])
    results = json.loads((tmp_path / "results.json").read_text())
    assert first.returncode == 2 and "few_shot" in first.stderr and "Traceback" not in first.stderr
    assert {"knn", "linear"} <= results.keys() and list(results["errors"]) == ["few_shot"]
    report = python("-m", "supmim_jax.report", f"--checkpoint={tmp_path}")
    assert report.returncode == 0, report.stderr
    refused = python(*run)
    assert refused.returncode == 2 and "few_shot.shots is 10" in refused.stderr
    again = python(*run, "--config.eval.few_shot.shots=2")
    results = json.loads((tmp_path / "results.json").read_text())
    assert again.returncode == 0 and "few_shot" in results and "errors" not in results


def test_a_checkpoint_that_cannot_be_probed_leaves_the_others(initial, tmp_path):
    both = [f"--checkpoint={tmp_path}/none", f"--checkpoint={initial}"]
    out = python("-m", "supmim_jax.probe", *both)
    assert out.returncode == 2 and f"There is no checkpoint in {tmp_path}/none" in out.stderr
    assert "kNN" in out.stdout and "Traceback" not in out.stderr
    (file,) = (tmp_path / "run" / "evals").glob("*.json")
    assert "errors" not in json.loads(file.read_text())
