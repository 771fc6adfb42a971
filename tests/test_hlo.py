"""What compiled programs cost, read from their HLO, against counts by hand."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from supmim_jax import sharding
from supmim_jax.config import MeshConfig
from supmim_jax.rehearse import hlo
from supmim_jax.rehearse.hlo import UnknownCost

N = 32
SQUARE = 2 * N**3  # a matmul of two NxN matrices


def compiled(function, *shapes) -> str:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().as_text()


def flops(text: str) -> int:
    return hlo.parse(text).flops


def count(function, *shapes) -> int:
    return flops(compiled(function, *shapes))


def scanned(depth: int):
    def run(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=depth)[0]

    return run


def test_matmuls():
    assert count(jnp.matmul, (8, 24), (24, 40)) == 2 * 8 * 24 * 40
    batched = count(lambda x, y: jnp.einsum("bnhd,bmhd->bhnm", x, y), (2, 8, 3, 16), (2, 9, 3, 16))
    assert batched == 2 * (2 * 3) * 8 * 9 * 16
    assert count(lambda x: jnp.tanh(x).sum(), (N, N)) == 0
    gradient = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), argnums=(0, 1))
    assert count(gradient, (N, N), (N, N)) == 3 * SQUARE


def nested(x, w):
    return jax.lax.scan(lambda x, _: (scanned(3)(x, w), None), x, None, length=5)[0]


def backwards(x, w):
    return jax.lax.while_loop(lambda s: s[0] > 2, lambda s: (s[0] - 3, s[1] @ w), (15, x))[1]


def until_equal(x, w):
    return jax.lax.while_loop(lambda s: s[0] != 6, lambda s: (s[0] + 2, s[1] @ w), (0, x))[1]


gradient = jax.grad(lambda x, w: scanned(7)(x, w).sum(), argnums=(0, 1))


@pytest.mark.parametrize(
    ("function", "matmuls"), [(nested, 15), (backwards, 5), (until_equal, 3), (gradient, 21)]
)
def test_loops_multiply(function, matmuls):
    """Also as on TPU, where only a loop's condition tells how often it runs."""
    text = compiled(function, (N, N), (N, N))
    stripped, changed = re.subn(r'"known_trip_count":{"n":"\d+"}', '"nothing":{}', text)
    assert changed
    assert [flops(x) for x in (text, stripped)] == [matmuls * SQUARE] * 2


def until(x, w):
    return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x)


def for_ever(x, w):
    return jax.lax.while_loop(lambda s: s[0] < 9, lambda s: (s[0], s[1] @ w), (0, x))[1]


def test_an_unknown_trip_count_is_an_error_where_it_matters():
    for function in (until, for_ever):
        with pytest.raises(UnknownCost, match=r"loop.*while"):
            count(function, (N, N), (N, N))
    assert count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, jnp.tanh, x), (N, N)) == 0


def test_a_condition_runs_once_more_than_its_body():
    text = """
%condition (s: (s32[], f32[8,8])) -> pred[] {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %p = pred[] custom-call(%y), custom_call_target="Any"
}

%body (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  ROOT %s = (s32[], f32[8,8]{1,0}) parameter(0)
}

ENTRY %main (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %s = (s32[], f32[8,8]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[8,8]{1,0}) while(%s), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"4"}}
}
"""
    assert flops(text) == 5 * 2 * 8**3
    with pytest.raises(UnknownCost):
        flops(text.replace("known_trip_count", "nothing"))


def test_conditional_takes_the_most_expensive_branch():
    def choose(i, x, w):
        branches = (lambda x: x + 1, lambda x: x @ w, lambda x: jnp.tanh(x @ w) @ w)
        return jax.lax.switch(i[0].astype(int), branches, x)

    assert count(choose, (1,), (N, N), (N, N)) == 2 * SQUARE


CONVOLUTIONS = {  # image, kernel, options
    "valid": ((2, 8, 8, 3), (3, 3, 3, 5), {"padding": "VALID"}),
    "same": ((2, 9, 8, 3), (3, 5, 3, 5), {"padding": "SAME"}),
    "strided": ((2, 9, 9, 3), (3, 3, 3, 5), {"padding": "SAME", "window_strides": (2, 3)}),
    "dilated": ((2, 7, 7, 3), (3, 3, 3, 5), {"padding": "SAME", "rhs_dilation": (2, 2)}),
    "transposed": ((2, 5, 5, 3), (4, 4, 3, 5), {"padding": [(2, 2)] * 2, "lhs_dilation": (2, 2)}),
    "grouped": ((2, 8, 8, 6), (3, 3, 2, 9), {"padding": "SAME", "feature_group_count": 3}),
    "batch groups": ((6, 8, 8, 2), (3, 3, 2, 9), {"padding": "SAME", "batch_group_count": 3}),
}


def convolve(options: dict):
    names = ("NHWC", "HWIO", "NHWC")
    options = {"window_strides": (1, 1), **options}
    return lambda x, w: jax.lax.conv_general_dilated(x, w, **options, dimension_numbers=names)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    x, w, options = CONVOLUTIONS[case]
    # Of ones, each multiply-add that meets no padding and no hole adds one.
    multiply_adds = int(convolve(options)(jnp.ones(x), jnp.ones(w)).sum())
    assert count(convolve(options), x, w) == 2 * multiply_adds

    gradient = jax.grad(lambda x, w: jnp.tanh(convolve(options)(x, w)).sum(), argnums=(0, 1))
    assert count(gradient, x, w) == 3 * 2 * multiply_adds


CUBLAS = """
ENTRY %main (a: f32[8,24], b: f32[24,40]) -> f32[8,40] {
  %a = f32[8,24]{1,0} parameter(0)
  %b = f32[24,40]{1,0} parameter(1)
  %c = (f32[8,40]{1,0}, s8[64]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = f32[8,40]{1,0} get-tuple-element(%c), index=0
}
"""
FUSED_ATTENTION = """
ENTRY %main (q: bf16[8,32,2,16], k: bf16[8,48,2,16]) -> bf16[8,2,32,16] {
  %q = bf16[8,32,2,16]{3,2,1,0} parameter(0)
  %k = bf16[8,48,2,16]{3,2,1,0} parameter(1)
  %c = (bf16[8,2,32,16]{3,1,2,0}, f32[8,2,32]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/jvp(encoder)/attention/call"}
  ROOT %d = bf16[8,2,32,16]{3,1,2,0} get-tuple-element(%c), index=0
}
"""
# Of queries and keys tokens are the last axis; attributes have several lines.
SPLASH = """
ENTRY %main (q: bf16[8,2,16,32], k: bf16[8,2,16,48]) -> bf16[8,2,32,16] {
  %q = bf16[8,2,16,32]{3,2,1,0} parameter(0)
  %k = bf16[8,2,16,48]{3,2,1,0} parameter(1)
  %splash_mha_fwd_residuals.1 = (f32[8,32,128]{2,1,0}, bf16[8,2,32,16]{3,2,1,0}) \
custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(f)/pallas_call"}
  %splash_mha_dkv_no_residuals = (f32[8,32,16]{2,1,0}, bf16[8,1,2,32,16]{4,3,2,1,0}, \
bf16[8,2,48,16]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %d = bf16[8,2,32,16]{3,2,1,0} get-tuple-element(%splash_mha_fwd_residuals.1), index=1
}
"""
# Both batch dimensions are spatial ones, of whose window one place meets the input.
TPU_BATCHED = """
ENTRY %main (q: bf16[16,256,12,64], k: bf16[16,256,12,64]) -> f32[16,12,256,256] {
  %q = bf16[16,256,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[16,256,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[16,12,256,256]{2,3,1,0:T(8,128)} convolution(%q, %k), \
window={size=16x12 stride=15x11 lhs_dilate=16x12}, dim_labels=0b1f_0o1i->01bf
}
"""
LOGITS = 2 * (8 * 2) * 32 * 48 * 16  # one matmul of either attention
COUNTED = {
    "cuBLAS": (CUBLAS, 2 * 8 * 24 * 40),
    "no matmul": (CUBLAS.replace("__cublas$gemm", "AllocateBuffer"), 0),
    "fused attention": (FUSED_ATTENTION, 2 * LOGITS),
    "its gradient": (FUSED_ATTENTION.replace("Softmax", "SoftmaxBackward"), 5 * LOGITS),
    "splash attention and gradient": (SPLASH, (2 + 5) * LOGITS),
    "batched matmul of TPU": (TPU_BATCHED, 2 * (16 * 12) * 256 * 256 * 64),
}


@pytest.mark.parametrize("case", COUNTED)
def test_matmuls_of_libraries_and_kernels(case):
    text, expected = COUNTED[case]
    assert flops(text) == expected


@pytest.mark.parametrize(
    "target", ["__onednn$matmul", "__cudnn$fmhaScaleBiasSoftmax", "__cudnn$convForward", "Mosaic"]
)
def test_calls_of_unknown_cost_are_refused(target):
    with pytest.raises(UnknownCost, match=re.escape(target)):
        flops(CUBLAS.replace("__cublas$gemm", target))
    with pytest.raises(UnknownCost, match="tpu_custom_call"):
        flops(SPLASH.replace("splash_mha_dkv", "other"))
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule nothing")


def test_shapes():
    found = hlo.arrays(
        "(bf16[16,512]{1,0:T(8,128)(2,1)S(1)}, s32[], /*index=2*/pred[3]{0}, u4[10])"
    )
    assert [a.bytes for a in found] == [16 * 512 * 2, 4, 3, 5]
    assert [a.space for a in found] == [1, 0, 0, 0]
    assert hlo.arrays("f8e4m3fn[7]{0}")[0].bytes == 7


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


def groups(attributes: str) -> np.ndarray:
    text = f"ENTRY %main () -> f32[1] {{\n  ROOT %x = f32[1] all-reduce(), {attributes}\n}}"
    return hlo.groups(hlo.parse(text).root)


def test_groups():
    for text, expected in GROUPS.items():
        assert groups(f"{text}, channel_id=1").tolist() == expected, text
    for text in ("replica_groups=all", "replica_groups=mesh['a'=2] {'a':(1)2}"):
        with pytest.raises(UnknownCost):
            groups(text)


def sharded(function, in_specs, out_spec, *shapes) -> list[hlo.Collective]:
    """Collectives of a jax.shard_map over 2 x 4 devices, axes data and fsdp."""
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4))
    run = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_spec, check_vma=False)
    values = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, in_specs, strict=True)
    ]
    return hlo.collectives(hlo.parse(jax.jit(run).lower(*values).compile().as_text()))


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


def test_groups_of_one_device_send_nothing():
    assert not sharded(lambda x: jax.lax.psum(x, "tensor"), (P(),), P(), (8,))


def test_a_collective_in_a_loop_counts_as_often():
    def fsdp(x, w):
        def layer(x, w):
            return x @ jax.lax.all_gather(w, "fsdp", tiled=True), None

        return jax.lax.scan(layer, x, w)[0]

    (found,) = sharded(fsdp, (P("data"), P(None, "fsdp")), P("data"), (64, 32), (7, 32, 32))
    assert (found.kind, found.times, found.bytes) == ("all-gather", 7, 32 * 32 * 4)

    def until(x):
        body = lambda x: jax.lax.psum(x, "fsdp")  # noqa: E731
        return jax.lax.while_loop(lambda x: x.sum() < 9, body, x)

    with pytest.raises(UnknownCost, match="unknown times"):
        sharded(until, (P(),), P(), (8,))


SCATTER = """
%all-reduce-scatter.N (i: bf16[64,32]) -> bf16[16,32] {
  %i = bf16[64,32]{1,0} parameter(0)
  %r = bf16[64,32]{1,0} all-reduce(%i), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %z = s32[] constant(0)
  ROOT %s = bf16[16,32]{1,0} dynamic-slice(%r, %z, %z), dynamic_slice_sizes={16,32}
}

%chain.N (w: bf16[16,32]) -> bf16[64,32] {
  %w = bf16[16,32]{1,0} parameter(0)
  ROOT %g = bf16[64,32]{1,0} all-gather(%w), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
}
"""
ASYNC = f"""{SCATTER.replace(".N", ".1")}{SCATTER.replace(".N", ".2")}
ENTRY %main (w: bf16[16,32]) -> bf16[16,32] {{
  %w = bf16[16,32]{{1,0}} parameter(0)
  %a = bf16[64,32]{{1,0}} fusion(%w), kind=kCustom, calls=%chain.1
  %b = bf16[64,32]{{1,0}} fusion(%w), kind=kCustom, calls=%chain.2
  %c = bf16[16,32]{{1,0}} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
  %d = bf16[16,32]{{1,0}} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.2
  %e = (bf16[16,32]{{1,0}}, bf16[16,32]{{1,0}}, u32[]) collective-permute-start(%c), \
channel_id=1, source_target_pairs={{{{0,1}},{{1,0}}}}
  %f = bf16[16,32]{{1,0}} collective-permute-done(%e)
  %g = (bf16[16,32]{{1,0}}, bf16[16,32]{{1,0}}, u32[]) collective-permute-start(%d), \
channel_id=1, source_target_pairs={{{{0,2}},{{2,0}}}}
  %h = bf16[16,32]{{1,0}} collective-permute-done(%g)
  ROOT %s = bf16[16,32]{{1,0}} add(%f, %h)
}}
"""


def test_as_tpu_writes_them():
    """A gather spread over fusions counts once, scatters and permutations of one channel each."""
    found = hlo.collectives(hlo.parse(ASYNC))
    shard, whole = 16 * 32 * 2, 64 * 32 * 2
    assert sorted((c.kind, c.bytes) for c in found) == [
        ("all-gather", whole),
        *[("collective-permute", shard)] * 2,
        *[("reduce-scatter", whole)] * 2,
    ]
    with pytest.raises(UnknownCost, match="ragged"):
        hlo.collectives(hlo.parse(ASYNC.replace("collective-permute-start", "ragged-all-to-all")))


THROUGH_A_LOOP = f"""{"".join(SCATTER.replace(".N", f".{i}") for i in (1, 2, 3))}
%body (s: (bf16[16,32])) -> (bf16[16,32]) {{
  %s = (bf16[16,32]{{1,0}}) parameter(0)
  %w = bf16[16,32]{{1,0}} get-tuple-element(%s), index=0
  %b = bf16[64,32]{{1,0}} fusion(%w), kind=kCustom, calls=%chain.2
  ROOT %t = (bf16[16,32]{{1,0}}) tuple(%w)
}}

%condition (s: (bf16[16,32])) -> pred[] {{
  %s = (bf16[16,32]{{1,0}}) parameter(0)
  ROOT %p = pred[] constant(true)
}}

ENTRY %main (w: bf16[16,32]) -> bf16[64,32] {{
  %w = bf16[16,32]{{1,0}} parameter(0)
  %a = bf16[64,32]{{1,0}} fusion(%w), kind=kCustom, calls=%chain.1
  %t = (bf16[16,32]{{1,0}}) tuple(%w)
  %l = (bf16[16,32]{{1,0}}) while(%t), condition=%condition, body=%body, \
backend_config={{"known_trip_count":{{"n":"8"}}}}
  ROOT %c = bf16[64,32]{{1,0}} fusion(%w), kind=kCustom, calls=%chain.3
}}
"""


def test_a_gather_that_goes_on_while_a_loop_runs_counts_once():
    (found,) = hlo.collectives(hlo.parse(THROUGH_A_LOOP))
    assert (found.kind, found.times) == ("all-gather", 1)
    inside = THROUGH_A_LOOP.replace("calls=%chain.1", "calls=%other").replace(
        "calls=%chain.3", "calls=%other"
    )
    other = "%other (w: bf16[16,32]) -> bf16[64,32] {\n  ROOT %w = bf16[64,32] parameter(0)\n}\n\n"
    (found,) = hlo.collectives(hlo.parse(other + inside))
    assert (found.kind, found.times) == ("all-gather", 8)


def test_scalars_that_depend_on_each_other_in_many_ways_are_computed_once():
    lines = [f"  %x{i + 1} = s32[] add(%x{i}, %x{i})" for i in range(60)]
    text = "\n".join(["ENTRY %main () -> s32[] {", "  %x0 = s32[] constant(1)", *lines])
    root = hlo.parse(text.replace("  %x60", "  ROOT %x60") + "\n}\n").root
    assert hlo.evaluate(root, ()) == 2**60


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
    moved = {r.instruction.name: hlo.traffic(r.instruction) for r in hlo.runs(hlo.parse(FUSED))}
    row, index = 64 * 4, 4
    assert moved["f"] == row + index + row + row  # slice, index; update, second result
    assert moved["s"] == row  # read, and written into VMEM
    assert moved["w"] == 2 * row and moved["x"] == moved["d"] == 0


def test_traffic_of_a_loop_is_that_of_its_layers():
    def run(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    def total(layers: int) -> int:
        entry = hlo.parse(compiled(run, (128, 128), (layers, 128, 128)))
        return sum(hlo.traffic(r.instruction) * (r.times or 1) for r in hlo.runs(entry))

    once = np.diff([total(8), total(16), total(24)])
    assert once[0] == once[1] and 8 * 3 * 128**2 * 4 <= once[0] <= 8 * 12 * 128**2 * 4
