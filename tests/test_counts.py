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
from supmim_jax.config import CMAEConfig, DecoderConfig, MAEConfig, MeshConfig, SupervisedConfig
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


def exact(result: dict) -> None:
    for part, directions in result["parts"].items():
        for direction, (found, expected) in directions.items():
            assert found == pytest.approx(expected, rel=1e-3), (part, direction)


@pytest.mark.parametrize("name", ["supervised", "masked", "visible"])
def test_flops_are_those_of_the_arithmetic(steps, name):
    result = steps(name)[3]
    assert result["ratio"] == pytest.approx(1.0, abs=1e-3), flops.report(result)


def test_names_repeat_next_to_nothing_and_full_the_forward_pass(steps):
    names, full = (steps(name)[3] for name in ("names", "full"))
    assert names["ratio"] < 1.03  # 25 tokens of width 64; <= 1.01 at ImageNet's size, docs/speed.md
    assert names["ratio_with_recomputed"] == pytest.approx(1.0, abs=3e-3)
    assert 1.2 < full["ratio"] < 4 / 3


def small(cfg, objective, **model):
    model = dataclasses.replace(cfg.model, width=64, mlp_dim=128, drop_path=0.0, **model)
    return dataclasses.replace(cfg, model=model, objective=objective)


DECODER = DecoderConfig(depth=2, width=32, mlp_dim=64, heads=2)


@pytest.mark.parametrize(
    ("objective", "pooling"), [(MAEConfig(), "cls"), (CMAEConfig(), "gap")], ids=["mae", "cmae"]
)
def test_steps_without_labels(cfg, one_device, objective, pooling):
    result = flops.measure(small(cfg, objective, pooling=pooling), one_device)
    exact(result)
    assert result["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_supmim_step_with_everything_on(cfg, one_device):
    """Visible patches only, CLS, LayerScale, rematerialization."""
    objective = dataclasses.replace(
        cfg.objective, decoder=DECODER, encoder_input="visible", mask_ratio=0.75
    )
    cfg = small(cfg, objective, pooling="cls", layer_scale=1e-4, remat="names")
    result = flops.measure(cfg, one_device)
    exact(result)
    assert 1.0 < result["ratio"] < 1.02  # attention's logits only, LayerScale or not
    assert result["ratio_with_recomputed"] == pytest.approx(1.0, abs=1e-3)
    assert "encoder, recomputed" in flops.report(result)


@pytest.mark.parametrize("branch", ["supervised", "supmim"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_step_repeats_no_work_and_sends_parameters_and_gradients_alone(cfg, branch, fsdp):
    """In bytes of all parameters: gathered twice by FSDP, reduced once; XLA's CPU backend reduces
    whole gradients where a TPU's scatters them, which sends as much as each is given."""
    objective = SupervisedConfig()
    if branch == "supmim":  # of a single block of a decoder XLA repeats nothing
        objective = dataclasses.replace(cfg.objective, decoder=DECODER)
    model = dataclasses.replace(cfg.model, width=128, mlp_dim=512, remat="names")
    cfg = dataclasses.replace(cfg, objective=objective, model=model)
    mesh = sharding.make_mesh(MeshConfig(fsdp=fsdp))
    prog = train_step.build(cfg, mesh)
    compiled = prog.step.lower(prog.state, prog.batch, prog.frozen).compile()
    result = flops.counted(cfg, mesh, compiled, 0.0)
    if branch == "supmim":  # unmixed, both branches embed the same patches, and XLA does so once
        found, expected = result["parts"]["patch embedding"].pop("forward")
        assert found == pytest.approx(expected / 2)
    exact(result)
    found = Counter()
    for one in hlo.collectives(hlo.parse(compiled.as_text())):
        found[one.kind] += one.bytes * one.times
    parameters = 4 * sum(x.size for x in jax.tree.leaves(prog.state.params))
    reduced = (found.pop("all-reduce") + found.pop("reduce-scatter", 0)) / parameters
    gathered = found.pop("all-gather", 0) / parameters
    assert 0.95 < reduced < 1.05
    assert 1.8 < gathered < 2.2 if fsdp > 1 else gathered == 0
    assert sum(found.values()) < 0.01 * parameters


@pytest.mark.parametrize("name", TEMPORARIES)
def test_temporary_memory_stays_in_its_band(steps, name):
    found = steps(name)[2].memory_analysis().temp_size_in_bytes / MIB
    assert 0.8 < found / TEMPORARIES[name] < 1.2, found


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_the_program_has_not_doubled(steps, name):
    module = hlo.parse(steps(name)[2].as_text()).module
    opcodes = Counter(x.opcode for part in module.values() for x in part.instructions.values())
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
