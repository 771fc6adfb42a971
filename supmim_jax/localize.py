"""The boxes that ContrastiveCrop crops by: one pass of the encoder over the training images."""

import jax
import numpy as np
from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.data import pipeline
from supmim_jax.data.contrastive_crop import WHOLE
from supmim_jax.evals import features
from supmim_jax.models import heat_map
from supmim_jax.types import Encoder


def boxes(encoder: Encoder, cfg: Config, mesh: Mesh) -> np.ndarray:
    """The box of each training image, the same on every process: uint8 Nx4, as `heat_map.bounds`.

    The encoder sees whole images, brought to its size without keeping their aspect.
    """
    size, threshold = cfg.data.image_size, cfg.data.contrastive_crop.threshold
    found = np.tile(np.uint8(WHOLE), (cfg.data.train_examples, 1))  # of broken records
    for batch in pipeline.whole_dataset(cfg, cfg.data.train_split, mesh):
        bounds = _bounds(heat(encoder, batch.views[0]), size, threshold)
        bounds, ids, weight = features.on_host((bounds, batch.id, batch.weight))
        found[ids[weight > 0]] = bounds[weight > 0]
    return found


def heat(encoder: Encoder, images: jax.Array) -> jax.Array:
    """Heat maps of uint8 images, float32 BxHxW; each takes two passes of the encoder."""
    empty = encoder.features(_emptied(images)).tokens
    return _heat_map(encoder.features(images).tokens, empty)


_emptied = jax.jit(heat_map.emptied)
_heat_map = jax.jit(heat_map.heat_map)
_bounds = jax.jit(heat_map.bounds, static_argnums=(1, 2))
