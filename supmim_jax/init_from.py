"""What a run's first step starts from: parameters drawn anew, or the encoder of another run.

The encoder that is brought in must be the same function of an image, only its size may change:
learned positions are then resized, fixed ones keep their places by config.model.position_grid.
"""

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from supmim_jax import checkpoint
from supmim_jax.batch import TrainState
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, section
from supmim_jax.errors import SetupError
from supmim_jax.train_step import Program

# Regularisation, rounding and memory of the training; everything else makes another encoder.
MAY_DIFFER = tuple(f"config.model.{x}" for x in ("drop_path", "dropout:", "dtype:", "remat:"))


def state(cfg: Config, prog: Program) -> TrainState:
    """The state of step 0, laid out like `prog.state`; the optimizer has not seen anything.

    Raises:
      SetupError: as `check`.
    """
    fresh = prog.init(jax.random.key(cfg.seed))
    if not cfg.init.checkpoint:
        return fresh
    params = fresh.params | restore(cfg, prog.state.params)
    return fresh.replace(params=params, ema=jax.tree.map(jnp.copy, params) if fresh.ema else {})


def check(cfg: Config, params: dict) -> None:
    """Reads no array, so that a run that cannot start fails before anything is written.

    Args:
      cfg: the run.
      params: its abstract parameters.

    Raises:
      SetupError: config.init.checkpoint is missing, or holds another encoder than `cfg` names.
    """
    if cfg.init.checkpoint:
        checkpoint.check_params(*source(cfg, params))


def restore(cfg: Config, params: dict) -> dict:
    """The parts of `params` that come from config.init.checkpoint, resized and laid out alike."""
    directory, like = source(cfg, params)
    found = checkpoint.restore_params(directory, like)
    if cfg.model.positions == "learned":
        wanted = params["encoder"]["positions"]
        resize = jax.jit(resized, static_argnums=1, out_shardings=wanted.sharding)
        found["encoder"]["positions"] = resize(found["encoder"]["positions"], side(cfg))
    return found


def source(cfg: Config, params: dict) -> tuple[epath.Path, dict]:
    """The checkpoint to start from and its abstract parameters, on the mesh of `params`."""
    path = cfg.init.checkpoint
    names = ["encoder", "head"] if cfg.init.head == "keep" else ["encoder"]
    if missing := [name for name in names if name not in params]:
        raise SetupError(
            f"config.init.checkpoint is {path!r}, but objective {cfg.objective.name!r} trains no "
            f"{' and no '.join(missing)} that could start from it."
        )
    try:
        directory = checkpoint.locate(path)
    except SetupError as error:
        raise SetupError(f"config.init.checkpoint: {error}") from None
    theirs = checkpoint.read_config(directory)
    changed = [
        difference
        for difference in differences(_description(theirs), _description(cfg))
        if not difference.startswith(MAY_DIFFER)
    ]
    if changed:
        raise SetupError(
            f"config.init.checkpoint {path} holds another encoder: {'; '.join(changed)} (there; "
            f"here). Set these as they are there, or start from another checkpoint."
        )
    if cfg.init.head == "keep" and theirs.data.num_classes != cfg.data.num_classes:
        raise SetupError(
            f"config.init.head is 'keep', but {path} has {theirs.data.num_classes} classes and "
            f"config.data.num_classes is {cfg.data.num_classes}. Set config.init.head to 'new'."
        )
    like = {name: params[name] for name in names}
    if cfg.model.positions == "learned":
        here = params["encoder"]["positions"]
        shape = (side(theirs) ** 2, cfg.model.width)
        there = jax.ShapeDtypeStruct(shape, here.dtype, sharding=here.sharding)
        like["encoder"] = like["encoder"] | {"positions": there}
    return directory, like


def resized(positions_LxD: jax.Array, side: int) -> jax.Array:
    """Learned positions of a square grid for one of `side` x `side` patches.

    Bicubic with antialiasing when the grid shrinks, as timm's resample_abs_pos_embed (to 1e-6); the
    kernel of DeiT's own code is another one, without antialiasing.
    """
    length, width = positions_LxD.shape
    old = round(length**0.5)
    grid = positions_LxD.reshape(old, old, width)
    return jax.image.resize(grid, (side, side, width), "bicubic").reshape(side**2, width)


def side(cfg: Config) -> int:
    """Patches per side of the image."""
    return cfg.data.image_size // cfg.model.patch


def _description(cfg: Config) -> dict[str, Any]:
    """All of the config that makes the encoder, with the grid of fixed positions written out."""
    model = section(cfg.model)
    if cfg.model.positions == "sincos2d":
        model["position_grid"] = cfg.model.position_grid or side(cfg)
    return {"model": model, "data": {"channels": cfg.data.channels}}
