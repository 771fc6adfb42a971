"""What a step costs, in counts that no load on the machine changes: a guard against regressions.

Of configs/debug.py and its kin, compiled as the other tests compile (XLA's CPU backend, level 0).
Where a number here moves on purpose, or with a new compiler, take over the one that the test found.
"""

import re
from collections import Counter

import jax
import pytest

from configs import debug, debug_supervised
from supmim_jax import sharding
from supmim_jax.config import (
    CMAEConfig,
    DecoderConfig,
    MAEConfig,
    MeshConfig,
    SupervisedConfig,
    changed,
)
from supmim_jax.models import transformer
from supmim_jax.models.masking import num_masked
from supmim_jax.rehearse import flops, hlo
from supmim_jax.train_step import TrainStep

MIB = 2**20
# Of this code with jax 0.10.2: MiB of temporaries, instructions in all computations, loops.
PROGRAMS = {
    "supervised": (42.1, 5960, 0),
    "masked": (93.3, 10263, 6),
    "visible": (63.0, 11144, 7),
    "names": (48.9, 8388, 8),
    "full": (26.9, 8305, 8),
}


def config(name: str):
    if name == "supervised":
        return debug_supervised.experiment()
    cfg = debug.experiment()
    if name == "visible":
        return changed(cfg, objective={"encoder_input": "visible", "mask_ratio": 0.75})
    return changed(cfg, model={"remat": {"masked": "none"}.get(name, name)})


def compiled(cfg, mesh):
    prog = TrainStep.build(cfg, mesh)
    step = prog.step.lower(prog.state, prog.batch, prog.frozen).compile()
    return prog, step, flops.counted(cfg, mesh, step)


def shared_embedding(cfg) -> float:
    """GF per image that XLA saves where both branches embed the same patches: unmixed."""
    twice = cfg.objective.masks_patches and cfg.objective.encoder_input == "masked"
    return flops.train(cfg)["patch embedding"].forward / 2 / 1e9 if twice else 0.0


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_step_costs_what_the_arithmetic_says(name, one_device):
    """FLOPs, memory, size of the program, and state that is updated in place."""
    cfg = config(name)
    prog, step, result = compiled(cfg, one_device)
    found = result["hlo_gf_per_image"] + shared_embedding(cfg)
    expected = result["analytic_gf_per_image"]
    if cfg.model.remat == "none":
        assert found == pytest.approx(expected, rel=1e-6)
    else:  # of a single block of a decoder XLA repeats nothing
        assert found / expected == pytest.approx({"names": 1.009, "full": 1.225}[name], abs=1e-3)
        assert result["ratio_with_recomputed"] == pytest.approx(1.0, abs=3e-3)

    temporaries, instructions, loops = PROGRAMS[name]
    memory = step.memory_analysis()
    assert memory.temp_size_in_bytes / MIB == pytest.approx(temporaries, rel=0.2)
    module = hlo.parse(step.as_text()).module
    all_of_it = [x for part in module.values() for x in part.instructions.values()]
    opcodes = Counter(x.opcode for x in all_of_it)
    # It is 65 where each layer computes the gradients of all later ones anew (`own_gradient`).
    assert max(len(x.operands) for x in all_of_it if x.opcode == "fusion") < 50
    # No gradient is copied transposed for that of a kernel (`cpu_matmul`).
    assert "lhs_contracting_dims={0}, rhs_contracting_dims={1}" not in step.as_text()
    assert 0.6 < opcodes.total() / instructions < 1.6, opcodes.total()
    assert opcodes["while"] <= loops and opcodes["custom-call"] == 0

    state = jax.tree.leaves(prog.state)
    aliases = re.search(r"input_output_alias={(.*?) }", step.as_text())[1]
    assert aliases.count("may-alias") + aliases.count("must-alias") == len(state)
    size = sum(x.size * x.dtype.itemsize for x in state)
    assert memory.alias_size_in_bytes == pytest.approx(size, rel=1e-3)


DECODER = DecoderConfig(depth=2, width=32, mlp_dim=64, heads=2)


@pytest.mark.parametrize("name", ["mae", "cmae", "supmim", "drawn"])
def test_objectives_with_everything_on_cost_what_the_arithmetic_says(cfg, one_device, name):
    """SupMIM with visible patches only, CLS, LayerScale and rematerialization; or drawn ratios."""
    supmim = {"decoder": DECODER, "encoder_input": "visible", "mask_ratio": 0.75}
    mixed = {"mixup": 0.5}  # so that the branches embed different images
    objective, model = {
        "mae": (MAEConfig(), {"pooling": "cls"}),
        "cmae": (CMAEConfig(), {"pooling": "gap"}),
        "supmim": (supmim, {"pooling": "cls", "layer_scale": 1e-4, "remat": "names"}),
        "drawn": ({"mask_ratio_std": 0.25, "classification": mixed}, {}),
    }[name]
    model |= {"width": 64, "mlp_dim": 128, "drop_path": 0.0}
    cfg = changed(cfg, model=model, objective=objective)
    result = flops.measure(cfg, one_device)
    assert result["ratio_with_recomputed"] == pytest.approx(1.0, abs=1e-6)
    assert result["ratio"] < 1.02  # attention's logits only, LayerScale or not
    assert "encoder" in flops.report(result)


@pytest.mark.parametrize("branch", ["supervised", "supmim"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_step_repeats_no_work_and_sends_parameters_and_gradients_alone(cfg, branch, fsdp):
    """In bytes of all parameters: gathered twice by FSDP, reduced once; XLA's CPU backend reduces
    whole gradients where a TPU's scatters them, which sends as much as each is given."""
    # Of a single block of a decoder XLA repeats nothing.
    objective = {"decoder": DECODER} if branch == "supmim" else SupervisedConfig()
    model = {"width": 128, "mlp_dim": 512, "remat": "names"}
    cfg = changed(cfg, objective=objective, model=model)
    prog, step, result = compiled(cfg, sharding.make_mesh(MeshConfig(fsdp=fsdp)))
    work = result["analytic_gf_per_image"] + result["recomputed_gf_per_image"]
    assert result["hlo_gf_per_image"] + shared_embedding(cfg) == pytest.approx(work, rel=1e-6)
    found = Counter()
    for one in hlo.collectives(hlo.parse(step.as_text())):
        found[one.kind] += one.bytes * one.times
    parameters = 4 * sum(x.size for x in jax.tree.leaves(prog.state.params))
    reduced = (found.pop("all-reduce") + found.pop("reduce-scatter", 0)) / parameters
    gathered = found.pop("all-gather", 0) / parameters
    assert 0.95 < reduced < 1.05
    assert 1.8 < gathered < 2.2 if fsdp > 1 else gathered == 0
    assert sum(found.values()) < 0.01 * parameters


@pytest.mark.parametrize("name", ["masked", "visible"])
def test_logits_are_of_masked_patches_alone_and_all_but_the_head_is_in_bfloat16(
    one_device, name, monkeypatch
):
    """Forward and backward; and no gather or scatter, which XLA does not fuse, makes others."""
    monkeypatch.setattr(transformer, "on_one_cpu", lambda: False)  # which has flat rows
    cfg, codes = config(name), 40  # no other array has 40 columns
    cfg = changed(
        cfg,
        batch_size=8,
        model={"dtype": "bfloat16"},
        objective={"target": {"codes": codes}},
        tokens={"cache": "any"},
    )
    prog = TrainStep.build(cfg, one_device)
    text = prog.step.lower(prog.state, prog.batch, prog.frozen).as_text()
    types = {
        found
        for line in text.splitlines()
        if re.search(r"stablehlo\.(dot_general|gather|scatter)", line)
        for found in re.findall(rf"tensor<8x(\d+)x{codes}x(\w+)>", line)
    }
    assert types == {(str(num_masked(25, cfg.objective.mask_ratio)), "bf16")}
    assert {str(x.dtype) for x in jax.tree.leaves(prog.state.params)} == {"float32"}
    operands = re.findall(r"stablehlo\.dot_general .* : \((.*)\) ->", text)
    found = Counter("bf16" in types for types in operands)
    assert found[False] == 3, [types for types in operands if "bf16" not in types]
    assert found[True] > 20
