"""The optimizer: warm-up and cosine, AdamW or LAMB, decay on matrices only."""

import re
from typing import Any

import jax
import optax

from supmim_jax.config import Config

DECAYED = re.compile(r"/kernel$")  # not biases, norms, positions, LayerScale, mask embeddings


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


def make(cfg: Config) -> optax.GradientTransformation:
    """The gradient transformation that the step applies."""
    optim = cfg.optim
    method = {"adamw": optax.adamw, "lamb": optax.lamb}[optim.name](
        schedule(cfg),
        b1=optim.b1,
        b2=optim.b2,
        eps=1e-8 if optim.name == "adamw" else 1e-6,
        weight_decay=optim.weight_decay,
        mask=decay_mask,
    )
    clip = optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    return optax.chain(clip, method)
