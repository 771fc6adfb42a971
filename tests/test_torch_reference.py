"""PyTorch's step is the same job as ours: as many parameters, the same kind of step."""

import json

import jax
import pytest

from supmim_jax.train_step import TrainStep

torch = pytest.importorskip("torch")

from rivals import torch_reference, torch_rival

from supmim_jax import bench
from supmim_jax.config import ClassificationConfig, SupervisedConfig, changed


def variants(cfg, name: str):
    """A config of the tests by name, its tokens from a cache."""
    changes = {
        "masked": {},
        "visible, cls": {
            "objective": {"encoder_input": "visible", "mask_ratio": 0.7},
            "model": {"pooling": "cls", "positions": "sincos2d", "gelu": "tanh"},
        },
        "layer scale, mixup": {
            "objective": {"classification": ClassificationConfig(mixup=0.5, loss="bce")},
            "model": {"layer_scale": 1e-4},
        },
        "supervised": {"objective": SupervisedConfig()},
    }[name]
    cache = "" if name == "supervised" else "any"
    return changed(cfg, tokens={"cache": cache}, **changes)


NAMES = ["masked", "visible, cls", "layer scale, mixup"]


@pytest.mark.parametrize("name", [*NAMES, "supervised"])
def test_both_models_have_the_same_parameters(cfg, one_device, name):
    cfg = variants(cfg, name)
    trainer = torch_reference.Trainer(torch_rival.shapes(cfg, "cpu", False))
    params = TrainStep.build(cfg, one_device).state.params
    ours = {name: bench.sizes_of(tree) for name, tree in params.items()}
    assert trainer.parameters() == ours
    assert {"encoder", "head"} <= set(ours) and ("decoder" in ours) == (name != "supervised")


@pytest.mark.parametrize("name", NAMES)
def test_a_step_goes_through_every_parameter_and_learns(cfg, name):
    """Forward through both branches, backward, clip and AdamW: as ours."""
    cfg = variants(cfg, name)
    shapes = torch_rival.shapes(changed(cfg, optim={"lr": 1e-2}), "cpu", False)
    trainer = torch_reference.Trainer(shapes | {"drop_path": 0.0})
    before = {k: v.detach().clone() for k, v in trainer.model.named_parameters()}
    losses = [float(trainer.step()) for _ in range(12)]
    assert losses[-1] < losses[0]
    for key, value in trainer.model.named_parameters():
        assert not torch.equal(before[key], value), key
    norm = sum(float((p.grad**2).sum()) for p in trainer.model.parameters()) ** 0.5
    assert norm <= cfg.optim.clip * 1.001
    decayed = {len(g["params"]): g["weight_decay"] for g in trainer.optimizer.param_groups}
    assert set(decayed.values()) == {cfg.optim.weight_decay, 0.0}


@pytest.mark.parametrize("name", ["masked", "visible, cls"])
def test_both_do_the_same_flops(cfg, one_device, name):
    """Counted by PyTorch and in our program."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from supmim_jax.rehearse import flops

    cfg = variants(cfg, name)
    trainer = torch_reference.Trainer(torch_rival.shapes(cfg, "cpu", False))
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter doesn't know the CPU's fused attention
    with plain, FlopCounterMode(display=False) as counter:
        trainer.step()
    expected = flops.measure(cfg, one_device)["hlo_flops_per_step"]
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_by_turns_in_another_process(cfg, one_device):
    cfg = changed(cfg, mesh={"data": 8})
    result = bench.measure(cfg, rounds=2, steps=1, rival=True, compile_rival=False)
    result = json.loads(json.dumps(result))
    assert result["tokens"] == "given"  # to both
    assert set(result["rival"]["times"]) == {"eager"}
    assert result["rival"]["threads"] == result["threads"]
    for median, least, most in map(result["rival"]["times"]["eager"].get, ("ratio", "cpu_ratio")):
        assert 0 < least <= median <= most
    text = bench.report(result)
    assert "| PyTorch 2" in text and "--nocompile_rival" in text
    assert jax.default_backend() == "cpu"


def test_another_model_is_no_rival(cfg):
    sizes = torch_rival.shapes(variants(cfg, "masked"), "cpu", False)
    with pytest.raises(RuntimeError, match=r"they are not the same, and their speeds say nothing"):
        torch_rival.Rival(sizes, {"encoder": 1})
    with pytest.raises(RuntimeError, match=r"(?s)PyTorch exited with 1: .*KeyError"):
        torch_rival.Rival({"threads": 1}, {})
