"""Fine-tuning on masks: encoder and head learn the class of each pixel."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import IGNORED, Config
from supmim_jax.models import segmentation
from supmim_jax.models.vit import pixels


class Segmentation(nnx.Module):
    """L = cross-entropy(head(encoder(image)), class of each pixel), the mean over pixels.

    Starts from another run's encoder by `config.init`, as the paper's segmentation results do from
    classification (arXiv 2312.00950); head, crops and schedule are our choices.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        model = segmentation.Segmenter(cfg, rngs=rngs)
        self.encoder, self.segmenter = model.encoder, model.segmenter

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The scalar loss of a batch, and the share of right pixels; `key` is that of the step."""
        features = self.encoder.features(pixels(batch.views[0]), key)
        logits = self.segmenter(features.tokens)
        loss = segmentation.pixel_cross_entropy(logits, batch.masks)
        counted = batch.masks != IGNORED
        right = segmentation.classes(logits, batch.masks.shape[1:]) == batch.masks
        return loss, {"loss": loss, "accuracy": right.sum() / jnp.maximum(counted.sum(), 1)}
