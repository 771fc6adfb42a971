"""FLOPs counted in compiled programs, against counts by hand."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from supmim_jax import sharding
from supmim_jax.config import CMAEConfig, DecoderConfig, MAEConfig, MeshConfig
from supmim_jax.rehearse import flops as flops_module
from supmim_jax.rehearse import hlo
from supmim_jax.rehearse.hlo import steps

N = 32
SQUARE = 2 * N**3  # a matmul of two NxN matrices


def compiled(function, *shapes) -> str:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().as_text()


def count(function, *shapes) -> int:
    return hlo.count(compiled(function, *shapes)).flops


def without_trip_counts(text: str) -> str:
    """As on TPU, where only a loop's condition tells how often it runs."""
    text, changed = re.subn(r'"known_trip_count":{"n":"\d+"}', '"nothing":{}', text)
    assert changed
    return text


def scanned(depth: int):
    def run(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=depth)[0]

    return run


def test_matmuls():
    assert count(jnp.matmul, (8, 24), (24, 40)) == 2 * 8 * 24 * 40
    batched = count(lambda x, y: jnp.einsum("bnhd,bmhd->bhnm", x, y), (2, 8, 3, 16), (2, 9, 3, 16))
    assert batched == 2 * (2 * 3) * 8 * 9 * 16
    assert count(lambda x: jnp.tanh(x).sum(), (N, N)) == 0


def test_gradient_of_a_matmul_is_two():
    gradient = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), argnums=(0, 1))
    assert count(gradient, (N, N), (N, N)) == 3 * SQUARE


@pytest.mark.parametrize("strip", [str, without_trip_counts])
def test_loops_multiply(strip):
    def nested(x, w):
        return jax.lax.scan(lambda x, _: (scanned(3)(x, w), None), x, None, length=5)[0]

    def backwards(x, w):
        return jax.lax.while_loop(lambda s: s[0] > 2, lambda s: (s[0] - 3, s[1] @ w), (15, x))[1]

    gradient = jax.grad(lambda x, w: scanned(7)(x, w).sum(), argnums=(0, 1))
    matmuls_of = {scanned(7): 7, nested: 15, backwards: 5, gradient: 21}
    for function, matmuls in matmuls_of.items():
        text = strip(compiled(function, (N, N), (N, N)))
        assert hlo.count(text).flops == matmuls * SQUARE, function


def test_unknown_trip_count_is_an_error():
    def until(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: jnp.tanh(x @ w), x)

    with pytest.raises(hlo.UnknownCost, match="trip count"):
        count(until, (N, N), (N, N))
    text = without_trip_counts(compiled(scanned(7), (N, N), (N, N)))
    with pytest.raises(hlo.UnknownCost, match="trip count"):
        hlo.count(text.replace("direction=LT", "direction=EQ"))
    free = count(lambda x: jax.lax.while_loop(lambda x: x.sum() < 9, jnp.tanh, x), (N, N))
    assert free == 0  # no matmul in it: its trip count does not matter


def test_steps_of_a_loop():
    assert steps("LT", 0, 7, 2) == 4
    assert steps("LE", 1, 7, 2) == 4
    assert steps("GT", 7, 0, -1) == 7
    assert steps("GE", 7, 0, -1) == 8
    assert steps("NE", 0, 6, 2) == 3
    assert steps("LT", 5, 5, 1) == 0
    assert steps("NE", 0, 7, 2) is steps("LT", 0, 7, -1) is steps("LT", 0, 7, 0) is None


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
    assert hlo.count(text).flops == 5 * 2 * 8**3
    with pytest.raises(hlo.UnknownCost, match="trip count"):
        hlo.count(text.replace("known_trip_count", "nothing"))


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


def test_convolution_by_hand():
    flops = count(convolve({"padding": "VALID"}), (2, 8, 8, 3), (3, 3, 3, 5))
    assert flops == 2 * (2 * 6 * 6 * 5) * (3 * 3 * 3)


HEAD = """
ENTRY %main (a: f32[8,24], b: f32[24,40]) -> f32[8,40] {
  %a = f32[8,24]{1,0} parameter(0)
  %b = f32[24,40]{1,0} parameter(1)
"""
CUBLAS = """  %c = (f32[8,40]{1,0}, s8[64]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %d = f32[8,40]{1,0} get-tuple-element(%c), index=0
}
"""


def test_custom_calls():
    assert hlo.count(HEAD + CUBLAS).flops == 2 * 8 * 24 * 40
    for target in (
        "__onednn$matmul",
        "__cudnn$fmhaScaleBiasSoftmax",
        "__cudnn$convForward",
        "Mosaic",
    ):
        with pytest.raises(hlo.UnknownCost, match=re.escape(target)):
            hlo.count(HEAD + CUBLAS.replace("__cublas$gemm", target))
    assert hlo.count(HEAD + CUBLAS.replace("__cublas$gemm", "AllocateBuffer")).flops == 0
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.count("HloModule nothing")


ATTENTION = """
ENTRY %main (q: bf16[8,32,2,16], k: bf16[8,48,2,16]) -> bf16[8,2,32,16] {
  %q = bf16[8,32,2,16]{3,2,1,0} parameter(0)
  %k = bf16[8,48,2,16]{3,2,1,0} parameter(1)
  %c = (bf16[8,2,32,16]{3,1,2,0}, f32[8,2,32]{2,1,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(f)/jvp(encoder)/attention/call"}
  ROOT %d = bf16[8,2,32,16]{3,1,2,0} get-tuple-element(%c), index=0
}
"""


def test_fused_attention_and_what_its_gradient_repeats():
    matmul = 2 * (8 * 2) * 32 * 48 * 16
    assert hlo.count(ATTENTION).by_scope == {"forward: encoder/attention": 2 * matmul}
    gradient = ATTENTION.replace("Softmax", "SoftmaxBackward").replace(
        "jvp(encoder)", "transpose(jvp(encoder))"
    )
    assert hlo.count(gradient).by_scope == {
        "backward: encoder/attention": 4 * matmul,
        "recomputed: encoder/attention": matmul,
    }


def test_tpu_writes_batched_matmuls_as_dilated_convolutions():
    """Both batch dimensions are spatial ones, of whose window one place meets the input."""
    text = """
ENTRY %main (q: bf16[16,256,12,64], k: bf16[16,256,12,64]) -> f32[16,12,256,256] {
  %q = bf16[16,256,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(0)
  %k = bf16[16,256,12,64]{3,1,2,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = f32[16,12,256,256]{2,3,1,0:T(8,128)} convolution(%q, %k), \
window={size=16x12 stride=15x11 lhs_dilate=16x12}, dim_labels=0b1f_0o1i->01bf
}
"""
    assert hlo.count(text).flops == 2 * (16 * 12) * 256 * 256 * 64


@jax.named_scope("encoder")
def tower(x, w):
    return jnp.tanh(x @ w)


def test_scopes_tell_functions_and_directions_apart():
    def loss(x, w, v):
        return (jax.checkpoint(tower)(x, w) @ v).sum()

    gradient = jax.grad(loss, argnums=(0, 1, 2))
    scopes = hlo.count(compiled(gradient, (N, N), (N, N), (N, N))).by_scope
    towers = {k.split(":")[0]: v for k, v in scopes.items() if k.endswith("encoder")}
    assert towers["backward"] == 2 * SQUARE


def small(cfg):
    model = dataclasses.replace(cfg.model, width=64, mlp_dim=128, drop_path=0.0)
    decoder = DecoderConfig(depth=2, width=32, mlp_dim=64, heads=2)
    objective = cfg.objective
    if objective.name == "supmim":
        objective = dataclasses.replace(objective, decoder=decoder)
    return dataclasses.replace(cfg, model=model, objective=objective)


def exact(result: dict) -> None:
    for part, directions in result["parts"].items():
        for direction, (found, expected) in directions.items():
            assert found == pytest.approx(expected, rel=1e-3), (part, direction)


def test_supervised_step(supervised, one_device):
    result = flops_module.measure(small(supervised), one_device)
    exact(result)
    assert result["ratio"] == pytest.approx(1.0, abs=1e-3)


def test_supmim_step_on_two_devices(cfg):
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:2])
    result = flops_module.measure(small(cfg), mesh)
    assert result["ratio"] == pytest.approx(1.0, abs=5e-3)
    # Unmixed, both branches embed the same patches, and XLA does so once.
    found, expected = result["parts"]["patch embedding"].pop("forward")
    assert found == pytest.approx(expected / 2)
    exact(result)


@pytest.mark.parametrize("pooling", ["gap", "cls"])
@pytest.mark.parametrize("objective", [MAEConfig(), CMAEConfig()], ids=lambda o: o.name)
def test_steps_without_labels(cfg, one_device, objective, pooling):
    cfg = small(dataclasses.replace(cfg, objective=objective))
    model = dataclasses.replace(cfg.model, pooling=pooling)
    result = flops_module.measure(dataclasses.replace(cfg, model=model), one_device)
    exact(result)
    assert result["ratio"] == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("mesh", [MeshConfig(fsdp=8), MeshConfig(data=2, fsdp=4)], ids=str)
def test_fsdp_repeats_no_work(supervised, mesh):
    """Without models/placement.py the devices of fsdp all compute each other's attention."""
    cfg = dataclasses.replace(small(supervised), batch_size=64)
    exact(flops_module.measure(cfg, sharding.make_mesh(mesh)))


def test_supmim_step_with_everything_on(cfg, one_device):
    """Visible patches only, CLS, LayerScale, rematerialization."""
    cfg = small(cfg)
    model = dataclasses.replace(cfg.model, pooling="cls", layer_scale=1e-4, remat="names")
    objective = dataclasses.replace(cfg.objective, encoder_input="visible", mask_ratio=0.75)
    cfg = dataclasses.replace(cfg, model=model, objective=objective)
    result = flops_module.measure(cfg, one_device)
    exact(result)
    assert 1.0 < result["ratio"] < 1.02  # attention's logits only, LayerScale or not
    assert result["ratio_with_recomputed"] == pytest.approx(1.0, abs=1e-3)
    assert "encoder, recomputed" in flops_module.report(result)
