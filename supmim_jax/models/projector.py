"""The head in whose space views of an image are compared."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.models.transformer import layer_norm, linear


class Projector(nnx.Module):
    """Linear, LayerNorm, GELU, linear, in float32.

    MoCo v3 (arXiv 2104.02057) has BatchNorm in this place; LayerNorm keeps examples, and devices,
    apart.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, *, rngs: nnx.Rngs):
        dtype = jnp.dtype("float32")
        self.hidden = linear(inputs, hidden, dtype, rngs)
        self.norm = layer_norm(hidden, dtype, rngs)
        self.output = linear(hidden, outputs, dtype, rngs)

    def __call__(self, x_BxD) -> jax.Array:
        """float32 Bx(outputs)."""
        return self.output(jax.nn.gelu(self.norm(self.hidden(x_BxD))))
