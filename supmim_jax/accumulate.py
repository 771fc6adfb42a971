"""A step's gradient from several micro-batches: the large batch's, with the memory of a small one.

The sum runs over examples, so whatever is drawn by an example's id (crops, masks), and mixing,
give what they give in the large batch; only DropPath is drawn anew for each micro-batch.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from supmim_jax.config import Config, ConfigError
from supmim_jax.models.placement import rows_of_parts
from supmim_jax.types import Batch


def check(cfg: Config, shards: int) -> None:
    """Raises ConfigError unless micro-batches of equal size fall on every shard of the batch."""
    parts = cfg.optim.accumulate
    if cfg.batch_size % (shards * parts):
        step = shards * parts
        below = cfg.batch_size - cfg.batch_size % step
        raise ConfigError(
            f"config.optim.accumulate is {parts}, which does not divide the "
            f"{cfg.batch_size / shards:g} rows that each of {shards} batch shards has. Take a "
            f"config.batch_size of {below or step} or {below + step}, or another accumulate."
        )
    if parts > 1 and cfg.batch_size // parts % 2:
        raise ConfigError(
            f"config.optim.accumulate is {parts}, which leaves micro-batches of "
            f"{cfg.batch_size // parts} examples; mixing pairs them, so it must be even."
        )


def gradients(
    of_batch: Callable[[Batch], tuple[Any, dict]], batch: Batch, parts: int
) -> tuple[Any, dict]:
    """Means over examples of what `of_batch` gives, gradients and metrics, as of the whole batch.

    Each is taken to be a mean over the examples that count (weight 1).
    """
    shapes = jax.eval_shape(of_batch, jax.tree.map(lambda x: x[0], split(batch, parts)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    def add(total, micro: Batch):
        count = micro.weight.sum()
        return jax.tree.map(lambda t, x: t + count * x, total, of_batch(micro)), None

    total, _ = jax.lax.scan(add, zeros, split(batch, parts))
    return jax.tree.map(lambda x: x / jnp.maximum(batch.weight.sum(), 1.0), total)


def split(batch: Batch, parts: int) -> Batch:
    """Micro-batches along a new leading axis, each with its number in `micro`.

    Of every `parts` neighbouring rows each micro-batch gets one, so that no row leaves its device.
    In the second half of the batch they are dealt in reverse: the mirror of a row in its
    micro-batch, which it is mixed with, is then its mirror in the batch.
    """

    def deal(x):
        rows = x.reshape(-1, parts, *x.shape[1:])
        at = jnp.arange(len(rows)).reshape(-1, *[1] * x.ndim)
        rows = jnp.where(at < len(rows) // 2, rows, rows[:, ::-1])
        return rows_of_parts(jnp.swapaxes(rows, 0, 1))

    return dataclasses.replace(jax.tree.map(deal, batch), micro=jnp.arange(parts))
