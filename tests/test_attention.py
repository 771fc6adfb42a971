"""Which form of attention is traced for which device; CUDA programs are lowered, not run."""

import functools
import re
from collections import Counter
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, make_frozen
from jax._src import core
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax._src.interpreters import partial_eval
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.sharding import AbstractDevice, AbstractMesh
from scipy import stats

from supmim_jax import sharding
from supmim_jax.config import MeshConfig, changed
from supmim_jax.models import transformer
from supmim_jax.models.transformer import device, implementation
from supmim_jax.train_step import TrainStep

H100 = ("gpu", "NVIDIA H100 80GB HBM3")
TPU, V5P = ("tpu", "TPU v5 lite"), ("tpu", "TPU v5")
CASES = [  # the form of 256 tokens, and of 257
    (H100, "bfloat16", 64, "cudnn", "xla"),
    (H100, "bfloat16", 128, "cudnn", "xla"),
    (H100, "float16", 8, "cudnn", "xla"),
    (H100, "float32", 64, "xla", "xla"),
    (H100, "bfloat16", 136, "xla", "xla"),  # too long
    (H100, "bfloat16", 44, "xla", "xla"),  # not a multiple of 8
    (("gpu", "Tesla T4"), "bfloat16", 64, "xla", "xla"),
    (("gpu", "AMD Instinct MI300X"), "bfloat16", 64, "xla", "xla"),
    (("cpu", "cpu"), "bfloat16", 64, "xla", "xla"),
    (("", ""), "bfloat16", 64, "xla", "xla"),
    (TPU, "bfloat16", 64, "grouped", "grouped"),
    (TPU, "float32", 44, "grouped", "grouped"),
    (V5P, "bfloat16", 64, "splash", "grouped"),
]


@pytest.mark.parametrize(("kind", "dtype", "head_dim", "even", "odd"), CASES)
def test_each_device_has_its_form(kind, dtype, head_dim, even, odd):
    for tokens, expected in ((256, even), (257, odd), (64, odd if kind == V5P else even)):
        assert implementation(jnp.dtype(dtype), tokens, head_dim, kind) == expected
    with jax.sharding.use_abstract_mesh(AbstractMesh((2,), ("tensor",))):  # which splits heads
        expected = "grouped" if kind == V5P else even
        assert implementation(jnp.dtype(dtype), 256, head_dim, kind) == expected


def stepped(cfg, mesh) -> tuple:
    """The program of a step, its metrics, and the moments of every gradient after it."""
    built = TrainStep.build(cfg, mesh)
    state = built.init(jax.random.key(0))
    frozen = sharding.put(make_frozen(cfg), built.frozen)
    lowered = built.step.lower(state, make_batch(cfg), frozen)
    state, metrics = built.step(state, make_batch(cfg), frozen)
    return lowered.as_text(), (metrics, jax.device_get(state.opt_state))


def assert_equal(found: tuple, expected: tuple) -> None:
    for name in expected[0]:
        assert float(found[0][name]) == pytest.approx(float(expected[0][name]), rel=1e-5), name
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found[1], expected[1]
    )


VISIBLE = "none", {"encoder_input": "visible", "mask_ratio": 0.75}
FORMS = [("names", {}), pytest.param(*VISIBLE, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("remat", "objective"), FORMS)
def test_groups_of_rows_give_what_xlas_form_gives(cfg, monkeypatch, remat, objective):
    """The loss and every gradient, on 4 shards of rows and 2 of heads, each in several groups."""
    model = {"remat": remat, "pooling": "cls", "drop_path": 0.0}
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    cfg = changed(cfg, model=model, mesh=mesh, objective=objective, batch_size=24)
    mesh = sharding.run_mesh(cfg)
    text, expected = stepped(cfg, mesh)
    monkeypatch.setattr(transformer, "device", lambda: TPU)
    monkeypatch.setattr(transformer, "GROUP_LOGITS", 3 * cfg.model.heads * 26**2)
    grouped_text, found = stepped(cfg, mesh)
    assert grouped_text.count("stablehlo.while") > text.count("stablehlo.while")
    assert "LayoutConstraint" in grouped_text and "LayoutConstraint" not in text
    assert_equal(found, expected)


def for_splash(cfg, remat):
    """256 tokens in the encoder and the decoder, on 8 shards of rows."""
    model = {"remat": remat, "patch": 2, "drop_path": 0.0}
    data = {"image_size": 32, "eval_resize": 32}
    return changed(cfg, model=model, data=data, mesh=MeshConfig(data=4, fsdp=2), batch_size=8)


def test_splash_gives_what_xlas_form_gives(cfg, monkeypatch):
    """The loss and every gradient."""
    cfg = for_splash(cfg, "names")
    mesh = sharding.run_mesh(cfg)
    _, expected = stepped(cfg, mesh)
    monkeypatch.setattr(transformer, "device", lambda: V5P)
    interpreted = mock.Mock(
        side_effect=functools.partial(splash.make_splash_mha_single_device, interpret=True)
    )
    monkeypatch.setattr(splash, "make_splash_mha_single_device", interpreted)
    _, found = stepped(cfg, mesh)
    assert interpreted.called
    assert_equal(found, expected)


def kernels(jaxpr) -> Counter:
    """Names of the Pallas kernels that a trace calls."""
    found = Counter()
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            found[equation.params["name"]] += 1
            continue
        for inside in core.jaxprs_in_params(equation.params):
            found += kernels(inside)
    return found


@pytest.mark.parametrize(("remat", "repeats"), [("none", 1), ("names", 1), ("full", 2)])
def test_a_step_for_v5p_has_the_kernel_once_per_segment(cfg, monkeypatch, remat, repeats):
    """Twice only where everything is computed again."""
    cfg = for_splash(cfg, remat)
    monkeypatch.setattr(transformer, "device", lambda: V5P)
    prog = TrainStep.build(cfg, sharding.run_mesh(cfg))
    jaxpr = prog.step.trace(prog.state, prog.batch, prog.frozen).jaxpr.jaxpr
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    stacks = 2 + 1  # the encoder's image and masked twin, the decoder
    assert kernels(used) == {
        "splash_mha_fwd_residuals": stacks * repeats,
        "splash_mha_dkv_no_residuals": stacks,
    }


@pytest.mark.parametrize(
    ("remat", "objective"), [pytest.param("names", {}, marks=pytest.mark.slow), VISIBLE]
)
def test_forms_for_one_cpu_give_what_jaxs_own_give(cfg, one_device, monkeypatch, remat, objective):
    """The loss and every gradient: attention, and matmuls with and without LayerScale."""
    model = {"layer_scale": 0.1, "drop_path": 0.0, "remat": remat}
    cfg = changed(cfg, model=model, objective=objective)
    text, found = stepped(cfg, one_device)
    monkeypatch.setattr(transformer, "on_one_cpu", lambda: False)
    usual_text, expected = stepped(cfg, one_device)
    assert text != usual_text and "erfc" not in text + usual_text
    assert_equal(found, expected)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 2**-8)])
def test_exact_gelu_and_its_gradient_keep_the_input_alone(dtype, rtol):
    x = jnp.linspace(-8, 8, 999).astype(dtype)
    found, pull_back = jax.vjp(lambda x: transformer.gelu(x, "exact"), x)
    (gradient,) = pull_back(jnp.ones_like(x))
    wide = np.asarray(x, np.float64)
    cdf = stats.norm.cdf(wide)
    expected = wide * cdf, cdf + wide * stats.norm.pdf(wide)
    for ours, theirs in zip((found, gradient), expected):
        assert ours.dtype == x.dtype
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, rtol, 1e-6)
    assert [kept.dtype for kept in jax.tree.leaves(pull_back)] == [x.dtype]


def test_the_device_is_the_meshs(one_device):
    assert device() == ("", "")
    mesh = sharding.make_mesh(MeshConfig())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert device() == ("cpu", "cpu")
        assert implementation(jnp.dtype("float32"), 25, 32, device()) == "xla"
    with jax.sharding.use_abstract_mesh(one_device.abstract_mesh):
        assert implementation(jnp.dtype("float32"), 25, 32, device()) == "cpu"
    elsewhere = AbstractDevice(device_kind=H100[1], num_cores=None, platform=H100[0])
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=elsewhere)):
        assert device() == H100


def calls(cfg, mesh) -> Counter:
    """Custom calls of the train step, lowered for CUDA."""
    prog = TrainStep.build(cfg, mesh)
    traced = prog.step.trace(prog.state, prog.batch, prog.frozen)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r"custom_call @(__cudnn\S+?)\(", text))


@pytest.mark.parametrize(
    ("remat", "repeats"),
    [pytest.param("none", 1, marks=pytest.mark.slow), ("names", 1), ("full", 2)],
)
def test_a_step_for_cuda_has_the_kernel_once_per_segment(
    cfg, one_device, monkeypatch, remat, repeats
):
    """Twice only where everything is computed again: `names` keeps what the kernel gave."""
    monkeypatch.setattr(transformer, "device", lambda: H100)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)  # there is none to ask
    cfg = changed(cfg, data={"image_size": 16})
    half = changed(cfg, model={"dtype": "bfloat16", "remat": remat})
    stacks = 2 + 1  # the encoder's image and masked twin, the decoder
    assert calls(half, one_device) == {
        "__cudnn$fmhaSoftmax": stacks * repeats,
        "__cudnn$fmhaSoftmaxBackward": stacks,
    }
    assert not calls(cfg, one_device)  # float32
    assert not calls(changed(half, model={"pooling": "cls"}), one_device)  # an odd number of tokens
