"""The bench of the train step: fields, whose time is whose, refusals. No time is judged."""

import json
import time
import types

import jax
import numpy as np
import pytest
from conftest import python
from rivals import torch_rival

from supmim_jax import bench
from supmim_jax.config import (
    ClassificationConfig,
    MAEConfig,
    MasksConfig,
    MeshConfig,
    PixelsConfig,
    SegmentationObjectiveConfig,
    SupervisedConfig,
    changed,
)
from supmim_jax.errors import SetupError
from supmim_jax.rehearse import flops, hlo
from supmim_jax.train_step import TrainStep


def test_fields_and_tables(cfg):
    """On a mesh, with the config's own pipeline."""
    cfg = changed(cfg, mesh=MeshConfig(data=2, fsdp=4))
    result = bench.measure(cfg, rounds=2, steps=1, where=True, data=True)
    result = json.loads(json.dumps(result))
    assert result["tokens"] == "in the step" and result["devices"].startswith("8 ")
    took = result["step"]
    assert 0 < took["min_s"] <= took["median_s"] <= took["max_s"]
    assert took["images_per_s"] == pytest.approx(cfg.batch_size / took["median_s"])
    rate = result["counts"]["model_flops"] / took["median_s"] / 8
    rows = cfg.batch_size * 25
    assert {"512x512x512", f"{rows}x32x64", f"{rows}x64x32"} <= set(result["peak"])
    assert result["mfu"] == pytest.approx(rate / max(result["peak"].values()))
    assert result["counts"]["ratio"] == pytest.approx(1.0, abs=0.05)
    assert result["memory"]["bytes"] > 1e5 and result["memory"]["by"] == "the compiler"
    parts = {"attention", "MLP", "decoder", "optimizer", "patch embedding", "tokenizer", "masks"}
    assert parts <= set(result["where"])
    assert sum(result["where"].values()) == pytest.approx(1.0)
    fed = result["data"]
    assert fed["steps"] == 2 and 0 <= fed["wait_s"] < fed["step_s"]
    assert fed["wait_share"] == pytest.approx(fed["wait_s"] / fed["step_s"])
    text = bench.report(result)
    assert "| attention | " in text and "| images/s | " in text and "PyTorch" not in text
    assert f"| data wait | {fed['wait_share']:.1%}" in text


def test_a_pipeline_that_is_slow_is_seen(cfg, monkeypatch):
    def slow(dataset, mesh):
        for _ in range(cfg.total_steps):
            time.sleep(0.2)
            yield like

    prog = types.SimpleNamespace(state={}, fixed={}, compiled=lambda s, b, f: (s, b))
    like = jax.numpy.zeros(())
    monkeypatch.setattr(bench.Dataset, "train", slow)
    found = bench.fed_by_pipeline(cfg, None, prog, 3)
    assert found["wait_share"] > 0.9 and 0.2 <= found["wait_s"] < 0.4
    with pytest.raises(SetupError, match=r"--data takes 13 steps.* 12"):
        bench.fed_by_pipeline(cfg, None, prog, 11)
    with pytest.raises(SetupError, match="--rival and --data"):
        bench.measure(cfg, rounds=2, steps=1, data=True, rival=True)


def test_random_batches_have_ids_of_the_codebook(cfg, one_device):
    cfg = changed(cfg, tokens={"cache": "any"})
    like = TrainStep.build(cfg, one_device).batch
    batch = bench.random_batch(cfg, like, np.random.default_rng(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(
        lambda x: (x.shape, x.dtype), like
    )
    assert batch.tokens.max() == cfg.objective.target.codes - 1
    assert batch.views[0].max() == 255 and (batch.weight == 1).all()


def test_turns_alternate_and_ratios_are_of_rounds():
    order = []

    def runner(name: str, *turns):
        turns = iter(turns)
        return lambda steps: order.append((name, steps)) or bench.Turn(*next(turns))

    ours, theirs = runner("a", (1, 1), (2, 2), (1, 4)), runner("b", (3, 1), (2, 2), (2, 2))
    turns = bench.by_turns({bench.OURS: ours, "eager": theirs}, 3, 7)
    assert order == [("a", 7), ("b", 7)] * 3
    ratios = {"ratio": [2.0, 1.0, 3.0], "cpu_ratio": [1.0, 0.5, 1.0]}
    assert torch_rival.compared(turns) == {"eager": {"median_s": 2.0, "cpu_s": 2.0} | ratios}


def test_time_goes_to_the_part_that_traced_it(cfg, one_device):
    prog = TrainStep.build(cfg, one_device)
    text = prog.step.lower(prog.state, prog.batch, prog.frozen).compile().as_text()
    known = [x for part in hlo.parse(text).module.values() for x in part.instructions.values()]
    parts = {bench.part_of(instruction): instruction.name for instruction in known}
    expected = {name.replace("_", " ") for name in bench.SCOPES} - {"contrastive", "encoder"}
    expected |= {"encoder, between blocks", bench.LOSS_AND_HEAD, bench.UNNAMED}
    assert expected == set(parts)
    spent = bench.by_part(text, [(parts["attention"], 3), (parts["masks"], 5), ("?", 2)])
    assert spent == {"attention": 3, "masks": 5, bench.UNNAMED: 2}
    loops = [instruction.name for instruction in known if instruction.opcode == "while"]
    assert not bench.by_part(text, [(loops[0], 9)])  # its body is counted


def test_a_program_that_cannot_be_counted_is_still_timed(cfg, monkeypatch):
    def fails(*_):
        raise hlo.UnknownCost("a kernel")

    monkeypatch.setattr(flops, "counted", fails)
    found = bench.counts(cfg, None, None)
    assert found["uncounted"] == "a kernel" and found["model_flops"] > 1e6


def test_command(tmp_path):
    out = tmp_path / "result.json"
    flags = ["--config=configs/debug.py", "--config.batch_size=4", "--config.model.width=16"]
    flags += ["--config.model.depth=1", "--rounds=1", "--steps=1", "--nowhere", f"--json={out}"]
    ran = python("-m", "supmim_jax.bench", "step", *flags)
    assert ran.returncode == 0, ran.stderr
    result = json.loads(ran.stdout.splitlines()[-1])
    assert result == json.loads(out.read_text()) and result["batch_size"] == 4
    assert "where" not in result


def test_what_has_no_arithmetic_or_rival_is_refused(cfg, monkeypatch):
    masks = {"masks": MasksConfig(field="segmentation")}
    other = changed(cfg, data=masks, objective=SegmentationObjectiveConfig())
    with pytest.raises(SetupError, match="'segmentation'"):
        bench.measure(other, rounds=2, steps=1)
    mixed = SupervisedConfig(classification=ClassificationConfig(cutmix=1.0))
    for changes, found in (
        ({"objective": MAEConfig()}, "'mae'"),
        ({"objective": mixed}, r"config\.objective\.classification\.cutmix is 1\.0"),
        ({"objective": {"target": PixelsConfig()}}, r"config\.tokens\.cache is False"),
        ({"optim": {"name": "lamb"}}, r"config\.optim\.name is 'lamb'"),
    ):
        with pytest.raises(SetupError, match=found):
            torch_rival.shapes(changed(cfg, **changes), "cpu", True)
    monkeypatch.setattr(torch_rival, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install -e '\.\[parity\]'"):
        bench.measure(cfg, rounds=2, steps=1, rival=True)


def test_the_rivals_device_is_ours():
    def mesh(platform: str, count: int):
        devices = np.array([types.SimpleNamespace(platform=platform)] * count)
        return types.SimpleNamespace(devices=devices, size=count)

    assert torch_rival.device(mesh("cpu", 8)) == "cpu"
    assert torch_rival.device(mesh("gpu", 1)) == "cuda"
    for platform, count, cure in (("gpu", 2, "CUDA_VISIBLE_DEVICES=0"), ("tpu", 1, "JAX_PLATFORM")):
        with pytest.raises(SetupError, match=f"--rival.*{cure}"):
            torch_rival.device(mesh(platform, count))
