"""The baseline, a ViT trained on labels, and the supervised term that `supmim` shares with it."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import ClassificationConfig, Config
from supmim_jax.models.vit import Classifier, pixels
from supmim_jax.objectives import losses


def binary(logits_BxV, targets_BxV) -> jax.Array:
    """DeiT-III's loss (arXiv 2204.07118), B: a mixed image is wholly of each of its classes."""
    return losses.sigmoid_cross_entropy(logits_BxV, 1.0 * (targets_BxV > 0))


LOSSES = {
    "softmax": optax.softmax_cross_entropy,
    "sigmoid": losses.sigmoid_cross_entropy,
    "bce": binary,
    "bce_mean": lambda logits, targets: binary(logits, targets) / logits.shape[-1],
}


def start_head(cfg: ClassificationConfig, head: nnx.Linear) -> None:
    """Starts sigmoid losses at the prior of one class in V, as AugReg's code does (bias -6.9)."""
    if cfg.loss != "softmax":
        head.bias[...] = jnp.full_like(head.bias[...], -jnp.log(head.out_features))


def classification_loss(cfg: ClassificationConfig, logits_BxV, targets_BxV, weight_B) -> jax.Array:
    """Mean loss of the batch, a scalar."""
    return losses.mean(LOSSES[cfg.loss](logits_BxV, targets_BxV), weight_B)


def accuracy(logits_BxV, batch: Batch) -> jax.Array:
    """Share of the examples whose largest logit is their label (of an unmixed image)."""
    hit = (logits_BxV.argmax(-1) == batch.label).astype(jnp.float32)
    return losses.mean(hit, batch.weight)


@jax.named_scope("mixing")
def mix(cfg: ClassificationConfig, images, batch: Batch, classes: int, key) -> tuple:
    """Images and soft targets BxV after mixup (1710.09412) or CutMix (1905.04899), if on.

    Each image is mixed with its mirror in the batch, with one coefficient per batch, as in scenic,
    timm and DeiT-III; when both are on a coin chooses, as in the latter two.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(batch.label, classes), cfg.label_smoothing)
    if not (cfg.mixup or cfg.cutmix):
        return images, targets
    coin_key, beta_key, box_key = jax.random.split(key, 3)
    share_cutmix = 0.5 if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0)
    use_cutmix = jax.random.bernoulli(coin_key, share_cutmix)
    alpha = jnp.where(use_cutmix, cfg.cutmix or 1.0, cfg.mixup or 1.0)
    share = jax.random.beta(beta_key, alpha, alpha)  # of the image itself
    if cfg.mixup_larger:
        share = jnp.where(use_cutmix, share, jnp.maximum(share, 1.0 - share))
    # CutMix's rectangle: (1 - share) of the area before it is cut at the border.
    half = jnp.sqrt(1.0 - share) / 2.0
    places = [(jnp.arange(size) + 0.5) / size for size in images.shape[1:3]]
    rows, columns = (
        (at > centre - half) & (at < centre + half)
        for at, centre in zip(places, jax.random.uniform(box_key, (2,)))
    )
    inside = rows[:, None] & columns & use_cutmix
    share = jnp.where(use_cutmix, 1.0 - inside.mean(), share)
    own = jnp.where(use_cutmix, ~inside, share).astype(images.dtype)[None, :, :, None]
    images = images * own + images[::-1] * (1.0 - own)
    return images, targets * share + targets[::-1] * (1.0 - share)


class Supervised(Classifier):
    """L = cross-entropy(head(pool(encoder(image))), label)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        super().__init__(cfg.model, cfg.data, rngs=rngs)
        self.cfg, self.classes = cfg.objective, cfg.data.num_classes
        start_head(self.cfg.classification, self.head)

    def loss(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        mix_key, drop_key, _ = jax.random.split(key, 3)  # mixes as SupMIM does
        encoder, cfg = self.encoder, self.cfg.classification
        images = pixels(batch.views[0])
        images, targets = mix(cfg, images, batch, self.classes, mix_key)
        (tokens,) = encoder.encode((encoder.embed(images),), batch.row_key(drop_key))
        logits = self.head(encoder.pool(tokens))
        loss = classification_loss(cfg, logits, targets, batch.weight)
        return loss, {"loss": loss, "accuracy": accuracy(logits, batch)}
