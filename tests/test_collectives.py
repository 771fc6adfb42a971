"""Bytes between devices and to main memory, read from HLO, against counts by hand."""

import dataclasses
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from supmim_jax import sharding, train_step
from supmim_jax.config import MeshConfig, SupervisedConfig
from supmim_jax.rehearse import hlo
from supmim_jax.rehearse.hlo import Instruction, UnknownCost, arrays, groups, parse

P = PartitionSpec


def instruction(attributes: str) -> Instruction:
    return Instruction("x", "f32[1]", "all-reduce", "", f", {attributes}, channel_id=1")


def test_shapes():
    found = arrays("(bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, s32[], /*index=2*/pred[3]{0}, u4[10])")
    assert [a.bytes for a in found] == [16 * 512 * 2, 4, 3, 5]
    assert [a.space for a in found] == [1, 0, 0, 0]
    assert arrays("f8e4m3fn[7]{0}")[0].bytes == 7


GROUPS = {
    "replica_groups={{0,2},{1,3}}": [[0, 2], [1, 3]],
    "replica_groups=[2,2]<=[4]": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[2,2]T(1,0)": [[0, 2], [1, 3]],
    "source_target_pairs={{0,3},{3,0}}": [[0, 3], [3, 0]],
    "replica_groups=mesh['a'=2,'b'=2] {'b'}": [[0, 1], [2, 3]],
    "replica_groups=mesh['a'=2,'b'=2] {'a','b'}": [[0, 1, 2, 3]],
    "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}": [[0, 1], [2, 3]],
    "replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'c'}": [[0, 2], [1, 3]],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups(text):
    assert groups(instruction(text)).tolist() == GROUPS[text]


def test_unknown_groups_are_an_error():
    for text in ("replica_groups=all", "replica_groups=mesh['a'=2] {'a':(1)2}"):
        with pytest.raises(UnknownCost, match="which devices"):
            groups(instruction(text))


def sharded(function, in_specs, out_spec, *shapes) -> list[hlo.Collective]:
    """Collectives of a jax.shard_map over 2 x 4 devices, axes data and fsdp."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)
    values = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return hlo.find(parse(jax.jit(run).lower(*values).compile().as_text()))


WHOLE = 64 * 32 * 4  # bytes of a float32 64x32
CASES = {  # operation, specs of input and output, kind, bytes, devices that take part
    "gather": (
        lambda x: jax.lax.all_gather(x, "fsdp", tiled=True),
        (P("fsdp"), P()), "all-gather", WHOLE, 4,
    ),
    "scatter": (
        lambda x: jax.lax.psum_scatter(x, "fsdp", tiled=True),
        (P(), P("fsdp")), "reduce-scatter", WHOLE, 4,
    ),
    "reduce": (lambda x: jax.lax.psum(x, "data"), (P(), P()), "all-reduce", WHOLE, 2),
    "exchange": (
        lambda x: jax.lax.all_to_all(x, "fsdp", 1, 0, tiled=True),
        (P("fsdp"), P(None, "fsdp")), "all-to-all", WHOLE // 4, 4,
    ),
    "permute": (
        lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]),
        (P("data"), P("data")), "collective-permute", WHOLE // 2, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_kind_by_hand(case):
    function, (before, after), kind, size, devices = CASES[case]
    (found,) = sharded(function, (before,), after, (64, 32))
    assert (found.kind, found.bytes, found.times) == (kind, size, 1)
    assert found.group_size == devices and found.dtypes == ("f32",)


def test_loops_multiply():
    def fsdp(x, w):
        def layer(x, w):
            return x @ jax.lax.all_gather(w, "fsdp", tiled=True), None

        return jax.lax.scan(layer, x, w)[0]

    (found,) = sharded(fsdp, (P("data"), P(None, "fsdp")), P("data"), (64, 32), (7, 32, 32))
    assert (found.kind, found.times, found.bytes) == ("all-gather", 7, 32 * 32 * 4)


def test_a_loop_of_unknown_length_is_an_error():
    def until(x):
        body = lambda x: jax.lax.psum(x, "fsdp")  # noqa: E731
        return jax.lax.while_loop(lambda x: x.sum() < 9, body, x)

    with pytest.raises(UnknownCost, match="unknown times"):
        sharded(until, (P(),), P(), (8,))


ASYNC = """
%all-reduce-scatter.1 (i: bf16[64,32]) -> bf16[16,32] {
  %i = bf16[64,32]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %z = s32[] constant(0)
  ROOT %s = bf16[16,32]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,32}
}

%all-reduce-scatter.2 (i: bf16[64,32]) -> bf16[16,32] {
  %i = bf16[64,32]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %z = s32[] constant(0)
  ROOT %s = bf16[16,32]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,32}
}

%chain.1 (w: bf16[16,32]) -> bf16[64,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  ROOT %g = bf16[64,32]{1,0} all-gather(%w), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

%chain.2 (w: bf16[16,32]) -> bf16[64,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  ROOT %g = bf16[64,32]{1,0} all-gather(%w), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (w: bf16[16,32]) -> bf16[16,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  %a = bf16[64,32]{1,0} fusion(%w), kind=kCustom, calls=%chain.1
  %b = bf16[64,32]{1,0} fusion(%w), kind=kCustom, calls=%chain.2
  %c = bf16[16,32]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %d = bf16[16,32]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.2
  %e = (bf16[16,32]{1,0}, bf16[16,32]{1,0}, u32[]) collective-permute-start(%c), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
  %f = bf16[16,32]{1,0} collective-permute-done(%e)
  %g = (bf16[16,32]{1,0}, bf16[16,32]{1,0}, u32[]) collective-permute-start(%d), channel_id=1, \
source_target_pairs={{0,2},{2,0}}
  %h = bf16[16,32]{1,0} collective-permute-done(%g)
  ROOT %s = bf16[16,32]{1,0} add(%f, %h)
}
"""


def test_as_tpu_writes_them():
    """A gather spread over fusions counts once, scatters and permutations of one channel each."""
    found = hlo.find(parse(ASYNC))
    sizes = sorted((c.kind, c.bytes) for c in found)
    shard, whole = 16 * 32 * 2, 64 * 32 * 2
    assert sizes == [
        ("all-gather", whole),
        ("collective-permute", shard),
        ("collective-permute", shard),
        ("reduce-scatter", whole),
        ("reduce-scatter", whole),
    ]
    with pytest.raises(UnknownCost, match="ragged"):
        hlo.find(parse(ASYNC.replace("collective-permute-start", "ragged-all-to-all")))


def test_groups_of_one_device_send_nothing():
    assert not sharded(functools.partial(jax.lax.psum, axis_name="tensor"), (P(),), P(), (8,))


FUSED = """
%slice_and_update (p: f32[10,64], q: f32[10,64], i: s32[]) -> (f32[10,64], f32[64]) {
  %p = f32[10,64]{1,0} parameter(0)
  %q = f32[10,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %v = f32[1,64]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,64}
  %n = f32[1,64]{1,0} negate(%v)
  %u = f32[10,64]{1,0} dynamic-update-slice(%q, %n, %i, %z)
  %r = f32[64]{0} bitcast(%n)
  ROOT %t = (f32[10,64]{1,0}, f32[64]{0}) tuple(%u, %r)
}

ENTRY %main (p: f32[10,64], q: f32[10,64], i: s32[]) -> f32[64] {
  %p = f32[10,64]{1,0} parameter(0)
  %q = f32[10,64]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %f = (f32[10,64]{1,0}, f32[64]{0}) fusion(%p, %q, %i), kind=kLoop, calls=%slice_and_update
  %v = f32[64]{0} get-tuple-element(%f), index=1
  %s = (f32[64]{0:S(1)}, f32[64]{0}, u32[]) copy-start(%v)
  %d = f32[64]{0:S(1)} copy-done(%s)
  %w = f32[64]{0} add(%d, %v)
  ROOT %x = f32[64]{0:S(1)} add(%d, %d)
}
"""


def test_traffic_by_hand():
    moved = {t.run.instruction.name: (t.bytes, t.overlaps) for t in hlo.traffic(parse(FUSED))}
    row, index = 64 * 4, 4
    assert moved["f"] == (row + index + row + row, False)  # slice, index; update, second result
    assert moved["s"] == (row, True)  # read, and written into VMEM
    assert moved["w"] == (2 * row, False) and moved["x"][0] == moved["d"][0] == 0


def test_traffic_of_a_loop_is_that_of_its_layers():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def total(layers: int) -> int:
        shapes = ((128, 128), (layers, 128, 128))
        values = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        module = parse(jax.jit(run).lower(*values).compile().as_text())
        return sum(t.bytes * (t.run.times or 1) for t in hlo.traffic(module))

    once = np.diff([total(8), total(16), total(24)])
    assert once[0] == once[1] and 8 * 3 * 128**2 * 4 <= once[0] <= 8 * 12 * 128**2 * 4


@pytest.mark.parametrize("branch", ["supervised", "supmim"])
@pytest.mark.parametrize("fsdp", [1, 8])
def test_a_step_sends_parameters_and_gradients_and_no_activations(cfg, branch, fsdp):
    """In bytes of all parameters: gathered twice by FSDP, reduced once; XLA's CPU backend reduces
    whole gradients where a TPU's scatters them, which sends as much as each is given."""
    objective = cfg.objective if branch == "supmim" else SupervisedConfig()
    model = dataclasses.replace(cfg.model, width=128, mlp_dim=512, remat="names")
    cfg = dataclasses.replace(cfg, objective=objective, model=model)
    prog = train_step.build(cfg, sharding.make_mesh(MeshConfig(fsdp=fsdp)))
    text = prog.step.lower(prog.state, prog.batch, prog.frozen).compile().as_text()
    found = Counter()
    for one in hlo.find(parse(text)):
        found[one.kind] += one.bytes * one.times
    parameters = 4 * sum(x.size for x in jax.tree.leaves(prog.state.params))
    reduced = (found.pop("all-reduce") + found.pop("reduce-scatter", 0)) / parameters
    gathered = found.pop("all-gather", 0) / parameters
    assert 0.95 < reduced < 1.05
    assert 1.8 < gathered < 2.2 if fsdp > 1 else gathered == 0
    assert sum(found.values()) < 0.01 * parameters
