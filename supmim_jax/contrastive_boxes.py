"""The boxes of ContrastiveCrop, from one pass of the encoder over the training images.

A heat map shows where in an image the encoder responds; the box surrounds its warm part.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from supmim_jax.batch import Encoder
from supmim_jax.data.loader import Dataset
from supmim_jax.data.transforms import WHOLE
from supmim_jax.evals import features


@jax.jit
def emptied(images_BxHxWxC) -> jax.Array:
    """Empty images of the same shape and dtype: each is filled with its median colour."""
    colour = jnp.median(images_BxHxWxC, axis=(1, 2), keepdims=True)
    return jnp.broadcast_to(colour, images_BxHxWxC.shape).astype(images_BxHxWxC.dtype)


@jax.jit
def heat_map(tokens_BxHxWxD, empty_BxHxWxD) -> jax.Array:
    """Distance of each token from that of an empty image in the same place, float32 BxHxW.

    ContrastiveCrop (arXiv 2202.03278, section 3.2) sums the channels of the last convolution. A
    ViT's tokens come out of a LayerNorm, so that their channels sum to next to nothing, and they
    tell places apart even where there is nothing to see: hence the distance to `emptied` images.
    """
    difference = tokens_BxHxWxD.astype(jnp.float32) - empty_BxHxWxD.astype(jnp.float32)
    return jnp.linalg.norm(difference, axis=-1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def bounds(heat_BxHxW, size: int, threshold: float) -> jax.Array:
    """Boxes around everything warm: uint8 Bx4, top, left, bottom, right in 255ths of the image.

    The map is enlarged to `size` x `size` and scaled to [0, 1], then cut at the threshold (arXiv
    2202.03278, section 3.2). The box of a map without differences is the whole image.
    ContrastiveCrop's code scales the map first, and leaves the last warm row and column out.
    """
    x = jax.image.resize(heat_BxHxW, (heat_BxHxW.shape[0], size, size), "linear")
    low, high = x.min((1, 2), keepdims=True), x.max((1, 2), keepdims=True)
    warm = (x - low) > threshold * (high - low)
    sides = []
    for axis in (2, 1):
        line = warm.any(axis)
        sides += [line.argmax(1), size - line[:, ::-1].argmax(1)]
    top, bottom, left, right = sides
    first = jnp.floor(jnp.stack([top, left], 1) * (255.0 / size))
    last = jnp.ceil(jnp.stack([bottom, right], 1) * (255.0 / size))
    flat = (high - low)[:, 0] <= 1e-6
    whole = jnp.array([0.0, 0.0, 255.0, 255.0])
    return jnp.where(flat, whole, jnp.concatenate([first, last], 1)).astype(jnp.uint8)


def boxes(encoder: Encoder, dataset: Dataset, mesh: Mesh) -> np.ndarray:
    """The box of each training image, the same on every process: uint8 Nx4, as `bounds`.

    The encoder sees whole images, brought to its size without keeping their aspect.
    """
    cfg = dataset.cfg
    size, threshold = cfg.data.image_size, cfg.data.contrastive_crop.threshold
    table = np.tile(np.uint8(WHOLE), (cfg.data.train_examples, 1))  # of broken records
    for batch in dataset.whole(cfg.data.train_split, mesh):
        found = bounds(heat(encoder, batch.views[0]), size, threshold)
        found, ids, weight = features.on_host((found, batch.id, batch.weight))
        table[ids[weight > 0]] = found[weight > 0]
    return table


def heat(encoder: Encoder, images: jax.Array) -> jax.Array:
    """Heat maps of uint8 images, float32 BxHxW; each takes two passes of the encoder."""
    empty = encoder.features(emptied(images)).tokens
    return heat_map(encoder.features(images).tokens, empty)
