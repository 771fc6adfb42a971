"""Masked autoencoder (MAE, arXiv 2111.06377): the pixels of masked patches from the others."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import Config
from supmim_jax.models import masking
from supmim_jax.models.decoder import Decoder
from supmim_jax.models.vit import ViT, pixels
from supmim_jax.objectives import losses, targets


class MAE(nnx.Module):
    """L = mean squared error of masked patches, each less its own mean, by its own deviation.

    The encoder sees the kept patches only; the decoder gets mask tokens in the places of the
    others (section 3). The target is the view that the encoder sees, colours included.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg.objective
        self.encoder = ViT(cfg.model, cfg.data, rngs=rngs)
        self.target = targets.Pixels(cfg, self.cfg.normalize_patches)
        side, outputs = self.encoder.side, self.target.outputs
        self.decoder = Decoder(
            self.cfg.decoder, cfg.model, side, outputs, inserts_masked=True, rngs=rngs
        )

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        drop_key, mask_key = jax.random.split(key)
        images = pixels(batch.views[0])
        mask = self.mask(mask_key, batch.id)
        predicted = self.decoder(self.encoded(images, mask, batch.row_key(drop_key)), mask)
        errors = mask.mean(self.target.loss(predicted, self.target.patches(images, mask)))
        loss = losses.mean(errors, batch.weight)
        return loss, {"loss": loss}

    @jax.named_scope("masks")
    def mask(self, key: jax.Array, ids_B) -> masking.Mask:
        """The masks of the examples with these ids."""
        return masking.sample("random", self.cfg.mask_ratio, self.encoder.side, key, ids_B)

    def encoded(self, images, mask: masking.Mask, key=None) -> jax.Array:
        """Tokens of the kept patches of float images, BxKxD, besides those before the patches."""
        (tokens,) = self.encoder.encode((self.encoder.embed(images, visible=mask),), key)
        return tokens

    def predict(self, images, mask: masking.Mask) -> jax.Array:
        """Predictions for every patch, float32 BxLxP, from the kept patches of float images."""
        tokens = self.encoded(images, mask)
        return self.decoder(tokens, mask, every_patch=True).astype(jnp.float32)
