"""Which form of attention runs where: one fused kernel, or XLA's matmuls and softmax.

On a GPU, XLA's form writes the logits of every head and pair of tokens to memory and reads them
again; cuDNN's kernel (flash attention, arXiv 2205.14135) keeps them on the chip.
"""

from typing import Literal

import jax
import jax.numpy as jnp

# Of cuDNN (jax/_src/cudnn/fused_attention_stablehlo.py); Hopper would take heads of up to 256.
MAX_HEAD_DIM, HEAD_DIM_STEP = 128, 8
FUSED_DTYPES = (jnp.bfloat16, jnp.float16)
# The kernel's equation in a trace.
KERNEL = "dot_product_attention_fwd_wrapper"


def implementation(
    dtype, tokens: int, head_dim: int, kind: tuple[str, str]
) -> Literal["cudnn", "xla"]:
    """The form for `tokens` activations of `dtype` on a device of `kind`, as `device` gives it.

    JAX refuses the gradient of cuDNN's for an odd number of tokens, such as 256 and a CLS token.
    cuDNN needs NVIDIA's Ampere or later. Names of older data-centre cards begin with "Tesla", and
    AMD's don't with "NVIDIA"; a GeForce of before 2020 must train in float32.
    """
    platform, name = kind
    nvidia = platform == "gpu" and name.startswith("NVIDIA")
    fits = head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0
    fits = fits and tokens % 2 == 0 and jnp.dtype(dtype) in FUSED_DTYPES
    return "cudnn" if nvidia and fits else "xla"


def device() -> tuple[str, str]:
    """Platform and kind of the devices that this is traced for; ("", "") where nothing says.

    Of the mesh that `program.build` and `inference.build_inference` trace for, which need not be
    of this process's devices: `rehearse` compiles for TPUs on a CPU.
    """
    found = jax.sharding.get_abstract_mesh().abstract_device
    return (found.platform, found.device_kind) if found else ("", "")


def keeps_kernel(primitive, *_, **__) -> bool:
    """A policy of jax.checkpoint: keep the kernel's output and its sums of each row's softmax."""
    return primitive.name == KERNEL
