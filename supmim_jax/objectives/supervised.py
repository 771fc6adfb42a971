"""The baseline: a ViT trained on labels."""

import jax
from flax import nnx

from supmim_jax.config import Config
from supmim_jax.models.vit import Classifier, pixels
from supmim_jax.objectives import classification
from supmim_jax.types import Batch, Metrics


class Supervised(nnx.Module):
    """L = cross-entropy(head(pool(encoder(image))), label)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg.objective
        self.classes = cfg.data.num_classes
        classifier = Classifier(cfg.model, cfg.data, rngs=rngs)
        self.encoder, self.head = classifier.encoder, classifier.head
        classification.start_head(self.cfg.classification, self.head)

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        """The scalar loss of a batch and its terms; `key` is that of the step."""
        mix_key, drop_key, _ = jax.random.split(key, 3)  # mixes as SupMIM does
        encoder, cfg = self.encoder, self.cfg.classification
        images = pixels(batch.views[0])
        images, targets = classification.mix(cfg, images, batch, self.classes, mix_key)
        (tokens,) = encoder.encode((encoder.embed(images),), batch.row_key(drop_key))
        logits = self.head(encoder.pool(tokens))
        loss = classification.loss(cfg, logits, targets, batch.weight)
        return loss, {"loss": loss, "accuracy": classification.accuracy(logits, batch)}
