"""Chooses the masked patches, equally many in every image: random (MAE) or block-wise (BEiT).

Both forms score the patches of an image and mask those ranked last, so shapes are static. Every
example's mask is a function of (key, id) alone, whatever batch or device it is on.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCKS = 64  # rectangles tried at most
TRIES = 10  # that fail in a row
MIN_BLOCK_AREA = 16 / 196  # of the grid
MAX_ASPECT = 1 / 0.3


class Mask(NamedTuple):
    keep: jax.Array  # int32 BxK: indices of the kept patches
    # int32 BxM: indices of the masked patches, in no order; K + M = L. Of a ratio that is drawn as
    # the step runs, all patches: K is 0, and the last of them are masked.
    hidden: jax.Array
    restore: jax.Array  # int32 BxL: place of each patch in [kept, masked]
    masked: jax.Array  # bool BxL: True where masked

    def mean(self, values_BxM) -> jax.Array:
        """Mean over each image's masked patches, B, of values in the order of `hidden`."""
        if self.keep.shape[1]:
            return values_BxM.mean(-1)
        masked = jnp.take_along_axis(self.masked, self.hidden, axis=1)
        return (values_BxM * masked).sum(-1) / masked.sum(-1)


def num_masked(patches: int, ratio: float) -> int:
    """Masked patches of an image: at least one masked and one kept."""
    return min(max(patches - int(patches * (1.0 - ratio)), 1), patches - 1)


def draw_ratio(mean: float, std: float, least: float, key: jax.Array) -> jax.Array:
    """A share of the patches to mask, from a normal cut to [least, 1]; a scalar."""
    low, high = ((end - mean) / std for end in (least, 1.0))
    return mean + std * jax.random.truncated_normal(key, low, high)


def from_scores(scores_BxL, ratio: float | jax.Array) -> Mask:
    """Keeps the patches with the lowest scores, as MAE's reference code does with its noise."""
    patches = scores_BxL.shape[1]
    count, kept = _count(patches, ratio)
    order = jnp.argsort(scores_BxL, axis=1)
    restore = jnp.argsort(order, axis=1)
    return Mask(order[:, :kept], order[:, kept:], restore, restore >= patches - count)


def sample(form: str, ratio: float | jax.Array, side: int, key: jax.Array, ids_B) -> Mask:
    """Masks of a side x side grid in the form "random" or "block", one for each int32 id.

    A ratio that is traced is rounded up to whole patches, as in MAGE's code, and may mask all.
    """
    score = {"random": random_scores, "block": block_scores}[form]
    count, _ = _count(side * side, ratio)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(ids_B)
    return from_scores(jax.vmap(lambda k: score(k, side, count))(keys), ratio)


def _count(patches: int, ratio: float | jax.Array) -> tuple[int | jax.Array, int]:
    """Masked patches, and how many have a place in `Mask.keep`."""
    if isinstance(ratio, jax.Array):
        return jnp.clip(jnp.ceil(ratio * patches).astype(int), 1, patches), 0
    count = num_masked(patches, ratio)
    return count, patches - count


def random_scores(key: jax.Array, side: int, count: int) -> jax.Array:
    """Uniform noise, float32 L: MAE's random masking (arXiv 2111.06377, section 3)."""
    return jax.random.uniform(key, (side * side,))


def block_scores(key: jax.Array, side: int, count: int) -> jax.Array:
    """Scores, float32 L, of 1 for `count` masked patches and else 0: BEiT's block-wise masking.

    As in BEiT's code (arXiv 2106.08254, algorithm 1; microsoft/unilm, beit/masking_generator.py)
    rectangles are laid down whose area is uniform from 16 patches of 196 to what is still to be
    masked, and aspect log-uniform in [0.3, 1/0.3]. One that would mask more than that, nothing new,
    or all of a row or column is left out. After ten in a row that code stops, with fewer patches
    masked than asked for. Here a last rectangle brings the number that shapes need: of ten, and the
    whole grid, that with the fewest patches too many is masked row by row until the number is
    reached. Then rows and columns change places, and ends, by coins.
    """
    draw_key, last_key, turn_key = jax.random.split(key, 3)

    def lay(state: tuple[jax.Array, jax.Array], draws_4):
        masked, failed = state
        new = _rectangle(draws_4, count - masked.sum(), side) & ~masked
        fits = (new.sum() > 0) & (new.sum() <= count - masked.sum()) & (failed < TRIES)
        failed = jnp.where(fits, 0, failed + 1)
        return (masked | (new & fits), failed), None

    draws = jax.random.uniform(draw_key, (BLOCKS, 4))
    (masked, _), _ = jax.lax.scan(lay, (jnp.zeros((side, side), bool), 0), draws)

    missing = count - masked.sum()
    draws = jax.random.uniform(last_key, (TRIES, 4))
    last = jax.vmap(lambda u: _rectangle(u, missing, side))(draws)
    last = jnp.concatenate([last, jnp.ones((1, side, side), bool)]) & ~masked
    size = last.sum((1, 2))
    new = last[jnp.argmin(jnp.where(size >= missing, size, side * side + 1))]
    masked |= new & (new.cumsum().reshape(side, side) <= missing)

    turn = jax.random.bernoulli(turn_key, shape=(3,))
    for coin, turned in zip(turn, (lambda x: x.T, lambda x: x[::-1], lambda x: x[:, ::-1])):
        masked = jnp.where(coin, turned(masked), masked)
    return masked.reshape(-1).astype(jnp.float32)


def _rectangle(draws_4, missing: jax.Array, side: int) -> jax.Array:
    """A rectangle of area, aspect and place by four numbers in [0, 1); bool side x side.

    Empty if it would be as high or wide as the grid.
    """
    area, aspect, *place = draws_4
    area = MIN_BLOCK_AREA * side**2 * (1.0 - area) + missing * area
    aspect = jnp.exp((2.0 * aspect - 1.0) * jnp.log(MAX_ASPECT))
    extent = jnp.round(jnp.stack([jnp.sqrt(area * aspect), jnp.sqrt(area / aspect)]))
    start = jnp.floor(jnp.stack(place) * (side - extent + 1))
    at = jnp.arange(side)
    rows, columns = ((at >= s) & (at < s + e) for s, e in zip(start, extent))
    return rows[:, None] & columns & (extent < side).all()
