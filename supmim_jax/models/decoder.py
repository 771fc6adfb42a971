"""The shallow transformer decoder that predicts the tokens of masked patches (SupMIM, MAE)."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.config import DecoderConfig, ViTConfig
from supmim_jax.models.masking import Mask
from supmim_jax.models.transformer import Transformer, embedding, layer_norm, linear, sincos2d


class Decoder(nnx.Module):
    """Encoder tokens to one prediction for each masked patch.

    With kept tokens only (MAE's form) it inserts a mask token at every masked place; with a token
    per patch (`masked` form) it takes them as they are. Positions are fixed 2-D sine-cosine ones,
    as in MAE. A CLS token, if there is one, goes through and is dropped before the output, as are
    kept patches: no loss asks for them.
    """

    def __init__(
        self,
        cfg: DecoderConfig,
        encoder: ViTConfig,
        side: int,
        outputs: int,
        *,
        inserts_masked: bool,
        rngs: nnx.Rngs,
    ):
        dtype = jnp.dtype(encoder.dtype)
        self.side = side
        self.inserts_masked = inserts_masked
        self.embed = linear(encoder.width, cfg.width, dtype, rngs)
        if inserts_masked:
            self.mask_token = embedding(rngs, cfg.width)
        options = {"layer_scale": 0.0, "gelu": encoder.gelu, "dtype": dtype}
        self.transformer = Transformer(cfg, encoder.remat, rngs, **options)
        self.norm = layer_norm(cfg.width, dtype, rngs)
        self.output = linear(cfg.width, outputs, dtype, rngs)

    @jax.named_scope("decoder")
    def __call__(self, tokens_BxNxD, mask: Mask, every_patch: bool = False) -> jax.Array:
        """Predictions in the encoder's dtype: BxMx(outputs), as `mask.hidden`.

        With `every_patch` for kept ones too, BxLx(outputs) in their places.
        """
        x = self.embed(tokens_BxNxD)
        patches = mask.masked.shape[1]
        kept = mask.keep.shape[1] if self.inserts_masked else patches
        cls, x = jnp.split(x, [x.shape[1] - kept], axis=1)
        if self.inserts_masked:
            hole = self.mask_token[...].astype(x.dtype)
            holes = jnp.broadcast_to(hole, (x.shape[0], patches - kept, x.shape[2]))
            x = jnp.concatenate([x, holes], axis=1)
            x = jnp.take_along_axis(x, mask.restore[..., None], axis=1)
        x = x + jnp.asarray(sincos2d(self.side, self.side, x.shape[2])).astype(x.dtype)
        x = jnp.concatenate([cls, x], axis=1)
        x = self.transformer(x, (x.shape[1],))[:, cls.shape[1] :]
        if not every_patch:
            x = jnp.take_along_axis(x, mask.hidden[..., None], axis=1)
        return self.output(self.norm(x))
