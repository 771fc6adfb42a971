"""Fine-tuning on masks: encoder and head learn the class of each pixel."""

import jax
import jax.numpy as jnp

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import IGNORED
from supmim_jax.models import segmentation
from supmim_jax.models.vit import pixels


class Segmentation(segmentation.Segmenter):
    """L = cross-entropy(head(encoder(image)), class of each pixel), the mean over pixels.

    Starts from another run's encoder by `config.init`, as the paper's segmentation results do from
    classification (arXiv 2312.00950); head, crops and schedule are our choices.
    """

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        features = self.encoder.features(pixels(batch.views[0]), key)
        logits = self.segmenter(features.tokens)
        loss = segmentation.pixel_cross_entropy(logits, batch.masks)
        counted = batch.masks != IGNORED
        right = segmentation.classes(logits, batch.masks.shape[1:]) == batch.masks
        return loss, {"loss": loss, "accuracy": right.sum() / jnp.maximum(counted.sum(), 1)}
