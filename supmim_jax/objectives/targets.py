"""What masked patches are predicted as: image tokens (SupMIM) or normalised pixels (MAE)."""

import jax
import jax.numpy as jnp
from flax import nnx

from supmim_jax.batch import Batch, Metrics
from supmim_jax.config import Config
from supmim_jax.models import freeze, kmeans
from supmim_jax.models.masking import Mask
from supmim_jax.models.vit import patchify, pixels
from supmim_jax.objectives import losses

PIXEL_EPSILON = 1e-6  # added to each patch's variance, as in MAE's reference code


class Tokens(nnx.Module):
    """Ids from the batch, if a cache brought them; else of a frozen tokenizer, in the step."""

    def __init__(self, cfg: Config):
        self.outputs = cfg.objective.target.codes
        self.smoothing = cfg.objective.token_smoothing
        if not cfg.tokens.cache:
            # Keys of its own: the run starts from the same weights with a cache and without.
            target, rngs = cfg.objective.target, nnx.Rngs(0)
            self.tokenizer = kmeans.make(target, cfg.model.patch, cfg.data, rngs)
            freeze(self.tokenizer)

    def __call__(self, batch: Batch, mask: Mask) -> jax.Array:
        """int32 ids BxM of the masked patches."""
        cached = batch.tokens is not None
        ids = batch.tokens if cached else self.tokenizer.encode(target_image(batch))
        return jnp.take_along_axis(ids.astype(jnp.int32), mask.hidden, axis=1)

    def loss(self, predicted_BxMxV, ids_BxM) -> jax.Array:
        """Cross-entropy of each patch, BxM."""
        return losses.token_cross_entropy(predicted_BxMxV, ids_BxM, self.smoothing)

    def metrics(self, predicted_BxMxV, ids_BxM, mask: Mask, weight_B) -> Metrics:
        hits = (predicted_BxMxV.argmax(-1) == ids_BxM).astype(jnp.float32)
        return {"mim_accuracy": losses.mean(mask.mean(hits), weight_B)}


class Pixels(nnx.Module):
    """Each patch's pixels, with its own mean and variance removed (arXiv 2111.06377, section 4)."""

    def __init__(self, cfg: Config, normalize: bool = True):
        self.patch, self.normalize = cfg.model.patch, normalize
        self.outputs = cfg.model.patch**2 * cfg.data.channels

    def __call__(self, batch: Batch, mask: Mask) -> jax.Array:
        """float32 masked patches BxMxP."""
        return self.patches(target_image(batch), mask)

    def patches(self, images, mask: Mask) -> jax.Array:
        """float32 masked patches BxMxP of float images BxHxWxC."""
        patches = patchify(images, self.patch)
        patches = jnp.take_along_axis(patches, mask.hidden[..., None], axis=1)
        if not self.normalize:
            return patches
        mean, deviation = statistics(patches)
        return (patches - mean) / deviation

    def restored(self, patches_BxLxP, images) -> jax.Array:
        """Inverse of `patches`, but of all: pixels BxLxP, with each patch's mean and deviation.

        This is how predictions are shown, as in MAE's demo: what is not their task is not shown.
        """
        if not self.normalize:
            return patches_BxLxP
        mean, deviation = statistics(patchify(images, self.patch))
        return patches_BxLxP * deviation + mean

    def loss(self, predicted_BxMxP, patches_BxMxP) -> jax.Array:
        """Mean squared error of each patch, BxM."""
        return ((predicted_BxMxP.astype(jnp.float32) - patches_BxMxP) ** 2).mean(-1)

    def metrics(self, predicted, patches, mask: Mask, weight_B) -> Metrics:
        return {}


def statistics(patches_BxLxP) -> tuple[jax.Array, jax.Array]:
    """Mean and deviation of each patch over its pixels and channels, BxLx1 each."""
    variance = patches_BxLxP.var(-1, keepdims=True, ddof=1)
    return patches_BxLxP.mean(-1, keepdims=True), jnp.sqrt(variance + PIXEL_EPSILON)


def target_image(batch: Batch) -> jax.Array:
    """Float images BxHxWxC before colour augmentation: it never touches the target."""
    return pixels(batch.views[0] if batch.target is None else batch.target)
