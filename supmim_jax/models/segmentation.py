"""Classifies each pixel from the grid of an encoder's tokens, by a linear or light conv head.

The logits are upsampled bilinearly to the size of the masks, where every pixel counts in the loss.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from supmim_jax.batch import Features
from supmim_jax.config import IGNORED, Config
from supmim_jax.models.vit import ViT, pixels


class LinearHead(nnx.Module):
    """One linear layer per token."""

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        self.output = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, tokens_BxHxWxD) -> jax.Array:
        return self.output(tokens_BxHxWxD)


class ConvHead(nnx.Module):
    """Twice 3x3 convolution, LayerNorm, GELU and doubling of the grid; then one linear layer.

    The upsampling half of a semantic FPN head (arXiv 1901.02446), with LayerNorm per position
    for its GroupNorm, so that nothing depends on the batch.
    """

    WIDTH = 128  # most channels of the convolutions

    def __init__(self, width: int, classes: int, *, rngs: nnx.Rngs):
        channels = min(width, self.WIDTH)
        self.conv1 = nnx.Conv(width, channels, (3, 3), rngs=rngs)
        self.norm1 = nnx.LayerNorm(channels, rngs=rngs)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), rngs=rngs)
        self.norm2 = nnx.LayerNorm(channels, rngs=rngs)
        self.output = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, tokens_BxHxWxD) -> jax.Array:
        x = tokens_BxHxWxD
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = nnx.gelu(norm(conv(x)))
            x = resized(x, (2 * x.shape[1], 2 * x.shape[2]))
        return self.output(x)


HEADS = {"linear": LinearHead, "conv": ConvHead}


class Segmenter(nnx.Module):
    """Encoder and head of a run that trains both on masks: all that there is at inference."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.encoder = ViT(cfg.model, cfg.data, rngs=rngs)
        self.size = cfg.data.image_size
        head = HEADS[cfg.objective.head]
        self.segmenter = head(cfg.model.width, cfg.data.masks.num_classes, rngs=rngs)

    def features(self, images) -> Features:
        """Features of uint8 BxHxWxC images, and the class of each of their pixels."""
        features = self.encoder.features(pixels(images))
        logits = self.segmenter(features.tokens)
        return features._replace(masks=classes(logits, (self.size, self.size)))


def resized(x_BxHxWxC, size: tuple[int, int]) -> jax.Array:
    b, _, _, c = x_BxHxWxC.shape
    return jax.image.resize(x_BxHxWxC, (b, *size, c), "bilinear")


def classes(logits_BxHxWxV, size: tuple[int, int]) -> jax.Array:
    """The likeliest class of each pixel, int32 BxYxX, of images of `size`."""
    return resized(logits_BxHxWxV, size).argmax(axis=-1).astype(jnp.int32)


def pixel_cross_entropy(logits_BxHxWxV, masks_BxYxX) -> jax.Array:
    """Mean cross-entropy over the pixels of the batch that count, at the size of the masks."""
    logits = resized(logits_BxHxWxV, masks_BxYxX.shape[1:])
    valid = masks_BxYxX != IGNORED
    labels = jnp.where(valid, masks_BxYxX, 0)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (loss * valid).sum() / jnp.maximum(valid.sum(), 1)
