"""Which form of attention is traced for which device; CUDA programs are lowered, not run."""

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.sharding import AbstractDevice, AbstractMesh

from supmim_jax import sharding, train_step
from supmim_jax.config import MeshConfig
from supmim_jax.models import transformer
from supmim_jax.models.transformer import device, implementation

H100 = ("gpu", "NVIDIA H100 80GB HBM3")
CASES = [
    (H100, "bfloat16", 64, "cudnn"),
    (H100, "bfloat16", 128, "cudnn"),
    (H100, "float16", 8, "cudnn"),
    (H100, "float32", 64, "xla"),
    (H100, "bfloat16", 136, "xla"),  # too long
    (H100, "bfloat16", 44, "xla"),  # not a multiple of 8
    (("gpu", "Tesla T4"), "bfloat16", 64, "xla"),
    (("gpu", "AMD Instinct MI300X"), "bfloat16", 64, "xla"),
    (("tpu", "TPU v5 lite"), "bfloat16", 64, "xla"),
    (("cpu", "cpu"), "bfloat16", 64, "xla"),
    (("", ""), "bfloat16", 64, "xla"),
]


@pytest.mark.parametrize(("kind", "dtype", "head_dim", "expected"), CASES)
def test_cudnn_where_it_can(kind, dtype, head_dim, expected):
    assert implementation(jnp.dtype(dtype), 256, head_dim, kind) == expected
    assert implementation(jnp.dtype(dtype), 257, head_dim, kind) == "xla"


def test_the_device_is_the_meshs():
    assert device() == ("", "")
    mesh = sharding.make_mesh(MeshConfig())
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert device() == ("cpu", "cpu")
    elsewhere = AbstractDevice(device_kind=H100[1], num_cores=None, platform=H100[0])
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=elsewhere)):
        assert device() == H100


def calls(cfg, mesh) -> Counter:
    """Custom calls of the train step, lowered for CUDA."""
    prog = train_step.build(cfg, mesh)
    traced = prog.step.trace(prog.state, prog.batch, prog.frozen)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return Counter(re.findall(r"custom_call @(__cudnn\S+?)\(", text))


@pytest.mark.parametrize(("remat", "repeats"), [("none", 1), ("names", 1), ("full", 2)])
def test_a_step_for_cuda_has_the_kernel_once_per_segment(
    cfg, one_device, monkeypatch, remat, repeats
):
    """Twice only where everything is computed again: `names` keeps what the kernel gave."""
    monkeypatch.setattr(transformer, "device", lambda: H100)
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91100)  # there is none to ask
    model = dataclasses.replace(cfg.model, dtype="bfloat16", remat=remat)
    cfg = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, image_size=16))
    stacks = 2 + 1  # the encoder's image and masked twin, the decoder
    found = calls(dataclasses.replace(cfg, model=model), one_device)
    assert found == {
        "__cudnn$fmhaSoftmax": stacks * repeats,
        "__cudnn$fmhaSoftmaxBackward": stacks,
    }
    assert not calls(cfg, one_device)  # float32
    odd = dataclasses.replace(model, pooling="cls")
    assert not calls(dataclasses.replace(cfg, model=odd), one_device)
