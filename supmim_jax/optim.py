"""The optimizer: warm-up and cosine, AdamW or LAMB, weight decay, rates by layer."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from supmim_jax.config import Config
from supmim_jax.sharding import path_name

MATRICES = re.compile(r"/kernel$")  # not biases, norms, positions, LayerScale, mask embeddings
DECAYED = {  # by config.optim.decay_on
    "matrices": MATRICES,
    "matrices_and_tokens": re.compile(r"/kernel$|(^|/)(cls|registers|mask_token|mask_embedding)$"),
    "all": re.compile(""),
}
STACKED = re.compile(r"(^|/)blocks/")  # parameters with a leading axis of layers
# For layer_decay. BEiT's code counts the mask embedding among the inputs, too.
ENCODER_INPUTS = re.compile(r"^(encoder/(patches/.*|positions|cls|registers)|mask_embedding)$")
ENCODER_BLOCKS = re.compile(r"^encoder/transformer/blocks/")


def decay_mask(params: Any, on: str = "matrices") -> Any:
    """True for the parameters that weight decay applies to; `on` is a key of DECAYED."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: bool(DECAYED[on].search(path_name(path))), params
    )


def schedule(cfg: Config) -> optax.Schedule:
    """Learning rate of a step: linear warm-up to the peak, then cosine to final_lr.

    Each step has its rate, and the cosine begins after the warm-up; or it is over all steps, with
    the warm-up as a factor (scenic), or in its place, by epochs (timm).
    """
    optim, peak = cfg.optim, cfg.peak_lr
    by_epoch, product = optim.schedule == "per_epoch", optim.schedule == "product"
    steps = cfg.data.train_examples / cfg.batch_size  # of an epoch
    warmup, total = cfg.warmup_steps, cfg.total_steps
    if by_epoch:
        warmup, total = warmup / steps, total / steps
    cosine = optax.cosine_decay_schedule(
        peak, total if by_epoch or product else total - warmup, optim.final_lr / (peak or 1.0)
    )
    rise = optax.linear_schedule(optim.warmup_lr, peak, max(warmup, 1))

    def rate(step):
        if product:
            return cosine(step) * jnp.minimum(step / max(warmup, 1), 1)
        now = jnp.floor(step / steps + 1e-4) if by_epoch else step
        after = cosine(now if by_epoch else jnp.maximum(now - warmup, 0))
        return jnp.where(now < warmup, rise(now), after) if warmup else after

    return rate


def layer_trust_ratio() -> optax.GradientTransformation:
    """LAMB's |parameter| / |update| (arXiv 1904.00962, algorithm 2) for each layer's matrices.

    Layers are stacked in one array, so its first axis is kept apart. Parameters without weight
    decay are left as Adam would move them, as in the LAMB that DeiT-III was trained with (apex);
    so is the head, which starts from zero and could only creep away from it.
    """

    def ratio(path: tuple, update: jax.Array, parameter: jax.Array) -> jax.Array:
        name = path_name(path)
        if not MATRICES.search(name) or name == "head/kernel":
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


def scale_by_layer(decay: float, depth: int) -> optax.GradientTransformation:
    """Multiplies updates by decay^(depth + 1 - i) for layer i of the encoder.

    As in BEiT's (arXiv 2106.08254) and MAE's fine-tuning codes: the embeddings are layer 0, block
    i is layer i + 1; its norm, the head and all that is no encoder are the top layer, of scale 1.
    """

    def scaled(path: tuple, update: jax.Array) -> jax.Array:
        name = path_name(path)
        if ENCODER_INPUTS.search(name):
            return update * decay ** (depth + 1)
        if ENCODER_BLOCKS.search(name):
            powers = np.arange(depth, 0, -1).reshape(-1, *[1] * (update.ndim - 1))
            return update * jnp.asarray(decay**powers, update.dtype)
        return update

    return optax.stateless(
        lambda updates, params: jax.tree_util.tree_map_with_path(scaled, updates)
    )


def make(cfg: Config) -> optax.GradientTransformation:
    """The gradient transformation that the step applies: clip, Adam, decay, learning rate."""
    optim = cfg.optim
    lamb = optim.name == "lamb"
    rate = optax.scale_by_learning_rate(schedule(cfg))
    if optim.layer_decay != 1.0:
        rate = optax.chain(rate, scale_by_layer(optim.layer_decay, cfg.model.depth))
    return optax.chain(
        optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
        optax.scale_by_adam(optim.b1, optim.b2, eps=optim.eps),
        optax.add_decayed_weights(
            optim.weight_decay, mask=lambda params: decay_mask(params, optim.decay_on)
        ),
        layer_trust_ratio() if lamb else optax.identity(),
        rate,
    )
