"""Which patches are masked: random (MAE) and block-wise (BEiT), always the same number.

Both rank the patches of an image by a score and mask those ranked last, so shapes are static.
Every example's mask is a function of (key, id) alone, whatever batch or device it is on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCKS = 16  # rectangles laid down at most; the last ones hardly ever matter
MIN_BLOCK_AREA = 1 / 12  # of the grid, as BEiT's 16 patches of 196
MAX_BLOCK_AREA = 0.4
MAX_ASPECT = 1 / 0.3


class Mask(NamedTuple):
    keep: jax.Array  # int32 BxK: indices of the kept patches
    hidden: jax.Array  # int32 BxM: indices of the masked patches, in no order; K + M = L
    restore: jax.Array  # int32 BxL: place of each patch in [kept, masked]
    masked: jax.Array  # bool BxL: True where masked


def num_masked(patches: int, ratio: float) -> int:
    """Masked patches of an image: at least one masked and one kept."""
    return min(max(patches - int(patches * (1.0 - ratio)), 1), patches - 1)


def from_scores(scores_BxL, ratio: float) -> Mask:
    """Keeps the patches with the lowest scores, as MAE's reference code does with its noise."""
    patches = scores_BxL.shape[1]
    kept = patches - num_masked(patches, ratio)
    order = jnp.argsort(scores_BxL, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Mask(order[:, :kept], order[:, kept:], restore, restore >= kept)


def sample(form: str, ratio: float, side: int, key: jax.Array, ids_B) -> Mask:
    """Masks of a side x side grid, one for each id.

    Args:
      form: "random" or "block".
      ratio: share of the patches that are masked.
      side: patches along each side.
      key: key of the step.
      ids_B: int32 ids of the examples.
    """
    score = {"random": random_scores, "block": block_scores}[form]
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_B)
    return from_scores(jax.vmap(lambda k: score(k, side))(keys), ratio)


def random_scores(key: jax.Array, side: int) -> jax.Array:
    """Uniform noise, float32 L: MAE's random masking (arXiv 2111.06377, section 3)."""
    return jax.random.uniform(key, (side * side,))


def block_scores(key: jax.Array, side: int) -> jax.Array:
    """Scores, float32 L, that mask rectangle after rectangle: BEiT's block-wise masking.

    BEiT (arXiv 2106.08254, algorithm 1) lays rectangles of random area and aspect until enough
    patches are covered. Here a patch scores by the first rectangle that covers it (noise breaks
    ties and orders the uncovered), so the last rectangle is cut to fit the number exactly.
    """
    area_key, aspect_key, place_key, noise_key = jax.random.split(key, 4)
    area = (
        side
        * side
        * jax.random.uniform(area_key, (BLOCKS,), minval=MIN_BLOCK_AREA, maxval=MAX_BLOCK_AREA)
    )
    limit = jnp.log(MAX_ASPECT)
    aspect = jnp.exp(jax.random.uniform(aspect_key, (BLOCKS,), minval=-limit, maxval=limit))
    extent = jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)])
    extent = jnp.clip(jnp.round(extent), 1, side)
    start = jnp.floor(jax.random.uniform(place_key, (2, BLOCKS)) * (side - extent + 1))
    at = jnp.arange(side)[:, None]
    rows, columns = ((at >= s) & (at < s + e) for s, e in zip(start, extent, strict=True))
    covered = rows[:, None] & columns[None, :]  # side x side x BLOCKS
    first = jnp.where(covered.any(-1), jnp.argmax(covered, axis=-1), BLOCKS)
    return (BLOCKS - first).reshape(-1) + jax.random.uniform(noise_key, (side * side,))
