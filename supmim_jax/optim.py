"""The optimizer: warm-up and cosine, AdamW or LAMB, decay on matrices only."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from supmim_jax.config import Config

DECAYED = re.compile(r"/kernel$")  # not biases, norms, positions, LayerScale, mask embeddings
STACKED = re.compile(r"(^|/)blocks/")  # parameters with a leading axis of layers


def path_name(path: tuple) -> str:
    """A pytree path as `encoder/transformer/blocks/qkv/kernel`."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def decay_mask(params: Any) -> Any:
    """True for the parameters that weight decay applies to."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(DECAYED.search(path_name(path))), params
    )


def schedule(cfg: Config) -> optax.Schedule:
    """Learning rate of a step: linear warm-up from 0 to the peak, then cosine to final_lr."""
    decay = optax.cosine_decay_schedule(
        cfg.peak_lr, cfg.total_steps - cfg.warmup_steps, cfg.optim.final_lr / (cfg.peak_lr or 1.0)
    )
    warmup = optax.linear_schedule(0.0, cfg.peak_lr, max(cfg.warmup_steps, 1))
    return optax.join_schedules([warmup, decay], [cfg.warmup_steps]) if cfg.warmup_steps else decay


def layer_trust_ratio() -> optax.GradientTransformation:
    """LAMB's |parameter| / |update| (arXiv 1904.00962, algorithm 2) for each layer's matrices.

    Layers are stacked in one array, so its first axis is kept apart. Parameters without weight
    decay are left as Adam would move them, as in the LAMB that DeiT-III was trained with (apex);
    so is the head, which starts from zero and could only creep away from it.
    """

    def ratio(path: tuple, update: jax.Array, parameter: jax.Array) -> jax.Array:
        name = path_name(path)
        if not DECAYED.search(name) or name == "head/kernel":
            return update
        axes = tuple(range(int(bool(STACKED.search(name))), update.ndim))
        norms = [jnp.sqrt((x**2).sum(axes, keepdims=True)) for x in (parameter, update)]
        either_zero = (norms[0] == 0) | (norms[1] == 0)
        return update * jnp.where(
            either_zero, 1.0, norms[0] / jnp.where(either_zero, 1.0, norms[1])
        )

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(ratio, updates, params)
    )


def make(cfg: Config) -> optax.GradientTransformation:
    """The gradient transformation that the step applies: clip, Adam, decay, learning rate."""
    optim = cfg.optim
    lamb = optim.name == "lamb"
    return optax.chain(
        optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
        optax.scale_by_adam(optim.b1, optim.b2, eps=1e-6 if lamb else 1e-8),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
        layer_trust_ratio() if lamb else optax.identity(),
        optax.scale_by_learning_rate(schedule(cfg)),
    )
