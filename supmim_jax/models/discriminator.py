"""The patch discriminator of adversarial tokenizer training (after arXiv 1611.07004)."""

import jax
from flax import nnx

from supmim_jax.config import AdversarialConfig
from supmim_jax.models.vqgan import numbered


class Discriminator(nnx.Module):
    """Images BxHxWxC to one logit per patch, Bxhxw: real where it is positive.

    No normalisation: with R1 it isn't needed (arXiv 1801.04406), and logits of an image then do not
    depend on the rest of the batch.
    """

    def __init__(self, cfg: AdversarialConfig, channels: int, *, rngs: nnx.Rngs):
        widths = [min(cfg.filters * 2**i, 8 * cfg.filters) for i in range(cfg.layers)]
        before = [channels, *widths[:-1]]
        self.layers = numbered(
            [
                nnx.Conv(inputs, outputs, (4, 4), strides=2, rngs=rngs)
                for inputs, outputs in zip(before, widths, strict=True)
            ]
        )
        self.logit = nnx.Conv(widths[-1], 1, (3, 3), rngs=rngs)

    def __call__(self, images) -> jax.Array:
        x = images
        for i in range(len(self.layers)):
            x = nnx.leaky_relu(self.layers[str(i)](x), 0.2)
        return self.logit(x)[..., 0]
