"""`probe` against training, on 1 and 8 devices; its files, its configs and its mistakes."""

import json
import subprocess
from pathlib import Path

import jax
import pytest
import tensorflow_datasets as tfds
from conftest import ONE, REPOSITORY, python, save_initial

from supmim_jax import cli, probe
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    EvalConfig,
    FewShotConfig,
    HeadTrainingConfig,
    KNNConfig,
    LinearProbeConfig,
    MAEConfig,
    MasksConfig,
    ProbeConfig,
    ProbeDataConfig,
    SegmentationConfig,
    SegmentationObjectiveConfig,
    changed,
)
from supmim_jax.config.configdict import from_configdict, to_configdict
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.train import train

pytestmark = pytest.mark.usefixtures("build_once")

NAMES = sorted(p.stem for p in Path(REPOSITORY, "configs/probes").glob("*.py"))
ALL = ("top1", "knn", "retrieval", "linear", "few_shot", "segmentation")
EVERYTHING = EvalConfig(
    batch_size=64,
    which=ALL,
    knn=KNNConfig(ks=(1, 20, 1000), report_k=20),
    linear=LinearProbeConfig(strengths=(0.01, 1.0)),
    few_shot=FewShotConfig(shots=2, draws=2),
    segmentation=SegmentationConfig(max_examples=60, training=HeadTrainingConfig(steps=20)),
)
FITTED = {
    *("linear", "few_shot", "miou/linear", "miou/conv"),
    *("pixel_accuracy/linear", "pixel_accuracy/conv"),
}


@pytest.fixture
def run(cfg):
    """A run whose evaluation is all that there is."""
    masks = {"field": "segmentation"}
    data = {"eval_split": "validation[:120]", "masks": masks, "flip": False}
    return changed(cfg, data=data, eval=EVERYTHING)


def test_training_and_probes_agree_on_1_and_8_devices_and_in_other_batches(run, tmp_path):
    trained = train(run, tmp_path, devices=ONE)
    checkpoint = Checkpoint.open(str(tmp_path))
    other_batch = ProbeConfig(eval=changed(EVERYTHING, batch_size=48))
    one, eight = probe.probe(checkpoint, devices=ONE), probe.probe(checkpoint, other_batch)
    assert (one.mesh.size, eight.mesh.size) == (1, 8)
    found, other = one.results.metrics, eight.results.metrics
    assert found == {name: trained[name] for name in found}
    assert set(found) == FITTED | {
        *("top1", "knn", "knn/k=1", "knn/k=20"),
        *("recall@1", "recall@10", "recall@100", "map@r"),
    }
    assert list(found) == list(other)
    for name, value in found.items():
        tolerance = 0.01 if name in FITTED else 0.0  # of a per cent
        assert abs(value - other[name]) <= tolerance, name
    assert one.results.details["linear"]["c"] == eight.results.details["linear"]["c"]


def test_a_probe_measures_what_it_is_asked_for_and_writes_it_down(run, initial):
    fewer = changed(EVERYTHING, which=("linear", "segmentation", "few_shot"))
    data = ProbeDataConfig(
        train_split="train[:64]", eval_split="test[:50]", masks=MasksConfig(field="segmentation")
    )
    report = probe.probe(Checkpoint.open(initial), ProbeConfig(data=data, eval=fewer), devices=ONE)
    path = probe.save(report, "mine")
    assert path.parent.parent == Path(initial) and path.name == "mine-0.json"
    document = json.loads(path.read_text())
    assert set(document["metrics"]) == FITTED and document["metrics"] == report.results.metrics
    linear, masks = document["details"]["linear"], document["details"]["segmentation"]
    assert str(linear["c"]) in linear["held_out"] and len(linear["held_out"]) == 2
    assert {head: len(x) for head, x in masks["iou"].items()} == {"linear": 31, "conv": 31}
    assert masks["trained_on"] == 60  # max_examples
    known = [x for x in masks["iou"]["conv"] if x is not None]
    assert sum(known) / len(known) == pytest.approx(document["metrics"]["miou/conv"])
    assert document["data"]["eval_split"] == "test[:50]"
    assert document["data"]["name"] == run.data.name  # of the run
    assert document["device"]["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1}
    assert document["versions"]["jax"] == jax.__version__
    assert from_configdict(document["config"], ProbeConfig) == report.asked
    assert [p.name for p in path.parent.iterdir()] == ["mine-0.json"]


def test_a_row_leaves_the_sweep_out_and_a_table_takes_rows_of_other_columns():
    rows = [{"encoder": "a", "kNN %": "1.00", "epochs": "3"}, {"encoder": "b", "linear": "2.00"}]
    assert probe.table(rows).splitlines() == [
        "| encoder | kNN % | linear | epochs | seconds |",
        "| ------- | ----- | ------ | ------ | ------- |",
        "| a       | 1.00  |        | 3      |         |",
        "| b       |       | 2.00   |        |         |",
    ]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return python("-m", "supmim_jax.probe", *arguments, JAX_NUM_CPU_DEVICES="2")


def test_the_command_takes_a_config_overrides_and_several_checkpoints(initial, data_dir):
    out = command(
        *("--config=configs/probes/fractals.py:tiny", "--split=validation[:40]"),
        *(f"--checkpoint={initial}", f"--checkpoint={initial}@0", f"--data_dir={data_dir}"),
        *("--config.eval.which=('knn','retrieval')", "--config.eval.knn.ks=(1,7)"),
        "--config.eval.retrieval.recalls=(1,5)",
    )
    assert out.returncode == 0, out.stderr
    heading, _, *rows = out.stdout.splitlines()
    assert f"| {Path(initial).name}@0 " in rows[0]
    names = [cell.strip() for cell in heading.split("|")]
    assert names[1:-3] == ["checkpoint", "encoder", "kNN %", "recall@1", "recall@5", "map@r"]
    assert len(rows) == 2 and rows[0] == rows[1]
    path = Path(initial, "evals/fractals-tiny-validation_40_-0.json")
    assert str(path) in out.stderr
    document = json.loads(path.read_text())
    assert {"knn", "knn/k=1", "knn/k=7"} < set(document["metrics"])
    assert document["device"]["mesh"]["data"] == 2
    assert document["details"]["knn"] == {"k": 20, "bank": 240}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/probes/none.py"], "--config names no readable file"),
        (["--config=configs/debug.py"], "config.batch_size does not exist"),
        (["--config.eval.which=('knn','lineer')"], "config.eval.which[1] is 'lineer'; known are"),
    ],
)
def test_a_mistake_is_answered_by_a_paragraph(arguments, message):
    arguments = ["--config=configs/probes/fractals.py", *arguments]  # of two the last counts
    out = command("--checkpoint=/nowhere", *arguments)
    assert out.returncode == 2 and message in out.stderr and "Traceback" not in out.stderr


def test_a_probe_that_measures_nothing_says_why(cfg, data_dir, tmp_path):
    run = save_initial(changed(cfg, objective=MAEConfig()), tmp_path / "run")
    out = command(
        *("--config=configs/probes/fractals.py:tiny", f"--data_dir={data_dir}"),
        *(f"--checkpoint={run}", "--config.eval.which=('top1',)"),
    )
    assert out.returncode == 2 and f"{run}: left out: top1. " in out.stderr


def test_a_head_for_other_masks_is_left_out_by_name(cfg, tmp_path):
    of = MasksConfig(field="segmentation")
    cfg = changed(cfg, objective=SegmentationObjectiveConfig(), data={"masks": of})
    run = Checkpoint.open(save_initial(cfg, tmp_path / "run"))
    found = {}
    for classes in (of.num_classes, of.num_classes + 9):
        data = ProbeDataConfig(masks=changed(of, num_classes=classes), eval_split="validation[:64]")
        report = probe.probe(run, ProbeConfig(data=data, eval=EvalConfig(which=("miou",))), ONE)
        found[classes] = "miou" in report.results.metrics, report.left_out()
    assert list(found.values()) == [(True, []), (False, ["miou"])]


REFUSED = (
    (
        {"masks": MasksConfig(field="segmentation", num_classes=5)},
        {},
        r"num_classes=5, .*'segmentation' has pixels of \[\d.*; expected are 0 to 4",
    ),
    ({}, {}, "eval.which has 'segmentation', but data.masks.field is empty"),
    ({"masks": MasksConfig(field="label")}, {}, "masks.field is 'label'"),
    ({"masks": MasksConfig(field="m")}, {}, "masks.field is 'm'.*image, segmentation"),
    ({"label_field": "c"}, {"which": ("knn",)}, "label_field"),
    ({"num_classes": 9}, {"which": ("knn",)}, r"num_classes is 9, but .* has 30 classes"),
    ({"eval_resize": 10}, {"which": ("knn",)}, "eval_resize is 10, but the centre crop needs"),
    ({"eval_split": "dev"}, {"which": ("top1",)}, "has no split 'dev'"),
    ({}, {"which": ("few_shot",)}, "shots is 10, but class"),
)


def test_what_cannot_be_measured_is_refused(initial):
    for data, evaluations, message in REFUSED:
        evaluations = {"batch_size": 64, "which": ("segmentation",)} | evaluations
        asked = ProbeConfig(data=ProbeDataConfig(**data), eval=EvalConfig(**evaluations))
        with pytest.raises(SetupError, match=message):
            probe.probe(Checkpoint.open(initial), asked, devices=ONE)


def test_only_training_evaluates_again():
    with pytest.raises(ConfigError, match=r"eval\.every is 5"):
        ProbeConfig(eval=EvalConfig(every=5))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_every_probe_config_fits_its_data_set_and_any_run(name, cfg):
    source = Path(REPOSITORY, "configs/probes", f"{name}.py").read_text()
    assert f"configs/probes/{name}.py" in source and "Hardware:" in source
    loaded = cli.load(f"{REPOSITORY}/configs/probes/{name}.py")
    asked = from_configdict(loaded, ProbeConfig)
    assert loaded.is_locked and from_configdict(to_configdict(asked), ProbeConfig) == asked
    data = asked.data.over(cfg.data)
    assert (data.image_size, data.channels) == (cfg.data.image_size, cfg.data.channels)
    changed(cfg, data=data, eval=asked.eval)  # raises what does not fit together
    features = dict(tfds.builder(data.name, data_dir=data.data_dir or None).info.features)
    if "segmentation" in asked.eval.which:
        assert isinstance(features[data.masks.field], tfds.features.Image)
    if set(asked.eval.which) - {"segmentation"}:
        assert features[data.label_field].num_classes == data.num_classes
