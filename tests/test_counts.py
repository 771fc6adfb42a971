"""What a step costs, in counts that no load on the machine changes: a guard against regressions.

Of configs/debug.py and its kin, compiled as the other tests compile (XLA's CPU backend, level 0).
Where a number here moves on purpose, or with a new compiler, take over the one that the test found.
"""

import dataclasses
import re
from collections import Counter

import jax
import pytest

from configs import debug, debug_supervised
from supmim_jax import sharding, train_step
from supmim_jax.config import MeshConfig
from supmim_jax.models.masking import num_masked
from supmim_jax.rehearse import flops, hlo

MIB = 2**20
# MiB of temporaries, and instructions in all computations, of this code with jax 0.10.2.
TEMPORARIES = {"supervised": 55.9, "masked": 112.5, "visible": 74.4, "names": 55.3, "full": 37.7}
INSTRUCTIONS = {"supervised": 4572, "masked": 9897, "visible": 9931, "names": 9890, "full": 10090}
LOOPS = {"supervised": 2, "masked": 7, "visible": 7, "names": 7, "full": 7}


def config(name: str):
    if name == "supervised":
        return debug_supervised.experiment()
    cfg = debug.experiment()
    if name == "visible":
        objective = dataclasses.replace(cfg.objective, encoder_input="visible", mask_ratio=0.75)
        return dataclasses.replace(cfg, objective=objective)
    remat = {"masked": "none"}.get(name, name)
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, remat=remat))


@pytest.fixture(scope="module")
def steps():
    """Compiled steps by name, each compiled once; and their configs and counts."""
    mesh, known = sharding.make_mesh(MeshConfig(), jax.devices()[:1]), {}

    def step(name: str):
        if name not in known:
            cfg = config(name)
            prog = train_step.build(cfg, mesh)
            compiled = prog.step.lower(prog.state, prog.batch, prog.frozen).compile()
            known[name] = cfg, prog, compiled, flops.counted(cfg, mesh, compiled, 0.0)
        return known[name]

    return step


@pytest.mark.parametrize("name", ["supervised", "masked", "visible"])
def test_flops_are_those_of_the_arithmetic(steps, name):
    result = steps(name)[3]
    assert result["ratio"] == pytest.approx(1.0, abs=1e-3), flops.report(result)


def test_names_repeat_next_to_nothing_and_full_the_forward_pass(steps):
    names, full = (steps(name)[3] for name in ("names", "full"))
    assert names["ratio"] < 1.03  # 25 tokens of width 64; <= 1.01 at ImageNet's size, docs/speed.md
    assert names["ratio_with_recomputed"] == pytest.approx(1.0, abs=3e-3)
    assert 1.2 < full["ratio"] < 4 / 3


@pytest.mark.parametrize("name", ["masked", "visible"])
def test_the_masked_branch_costs_its_share_by_arithmetic(steps, name):
    """More than the supervised twin by what the second pass and the decoder need, no more."""
    (twin, *_, alone), (cfg, *_, both) = steps("supervised"), steps(name)
    extra = both["hlo_gf_per_image"] - alone["hlo_gf_per_image"]
    model = {x: sum(w.model for w in flops.train(c).values()) / 1e9 for x, c in
             (("both", cfg), ("alone", twin))}  # fmt: skip
    assert extra == pytest.approx(model["both"] - model["alone"], rel=3e-3)


@pytest.mark.parametrize("name", TEMPORARIES)
def test_temporary_memory_stays_in_its_band(steps, name):
    found = steps(name)[2].memory_analysis().temp_size_in_bytes / MIB
    assert 0.8 < found / TEMPORARIES[name] < 1.2, found


def test_rematerialization_saves_memory(steps):
    none, names, full = (
        steps(name)[2].memory_analysis().temp_size_in_bytes for name in ("masked", "names", "full")
    )
    assert none > 1.1 * names > 1.1 * full


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_program_has_not_doubled(steps, name):
    module = hlo.parse(steps(name)[2].as_text())
    opcodes = Counter(
        x.opcode for part in module.computations.values() for x in part.instructions.values()
    )
    assert 0.6 < opcodes.total() / INSTRUCTIONS[name] < 1.6, opcodes.total()
    assert opcodes["while"] <= LOOPS[name], opcodes["while"]
    assert opcodes["custom-call"] == 0


@pytest.mark.parametrize("name", ["supervised", "masked"])
def test_parameters_and_moments_are_updated_in_place(steps, name):
    _, prog, compiled, _ = steps(name)
    state = jax.tree.leaves(prog.state)
    aliases = re.search(r"input_output_alias={(.*?) }", compiled.as_text())[1]
    assert aliases.count("may-alias") + aliases.count("must-alias") == len(state)
    size = sum(x.size * x.dtype.itemsize for x in state)
    assert compiled.memory_analysis().alias_size_in_bytes == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("name", ["masked", "visible"])
def test_logits_are_of_masked_patches_alone_and_stay_in_bfloat16(one_device, name):
    """Forward and backward; and no gather or scatter, which XLA does not fuse, makes others."""
    cfg, codes = config(name), 40  # no other array has 40 columns
    target = dataclasses.replace(cfg.objective.target, codes=codes)
    cfg = dataclasses.replace(
        cfg,
        batch_size=8,
        model=dataclasses.replace(cfg.model, dtype="bfloat16"),
        objective=dataclasses.replace(cfg.objective, target=target),
        tokens=dataclasses.replace(cfg.tokens, cache="any"),
    )
    prog = train_step.build(cfg, one_device)
    text = prog.step.lower(prog.state, prog.batch, prog.frozen).as_text()
    types = {
        found
        for line in text.splitlines()
        if re.search(r"stablehlo\.(dot_general|gather|scatter)", line)
        for found in re.findall(rf"tensor<8x(\d+)x{codes}x(\w+)>", line)
    }
    assert types == {(str(num_masked(25, cfg.objective.mask_ratio)), "bf16")}


def test_matmuls_are_in_bfloat16_but_for_the_head_and_parameters_are_not(one_device):
    cfg = config("masked")
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, dtype="bfloat16"),
        tokens=dataclasses.replace(cfg.tokens, cache="any"),
    )
    prog = train_step.build(cfg, one_device)
    assert {str(x.dtype) for x in jax.tree.leaves(prog.state.params)} == {"float32"}
    text = prog.step.lower(prog.state, prog.batch, prog.frozen).as_text()
    operands = re.findall(r"stablehlo\.dot_general .* : \((.*)\) ->", text)
    found = Counter("bf16" in types for types in operands)
    assert found[False] == 3, [types for types in operands if "bf16" not in types]
    assert found[True] > 20
