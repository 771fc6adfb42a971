"""What a run's first step starts from: new random parameters, or the encoder of another run.

The other encoder must be the same function of an image, except for the image's size. For another
size learned positions are resized, and config.model.position_grid keeps fixed ones in their places.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config
from supmim_jax.config.configdict import differences, section
from supmim_jax.errors import SetupError
from supmim_jax.train_step import TrainStep

# Regularisation, rounding and memory of the training; everything else makes another encoder.
MAY_DIFFER = tuple(f"config.model.{x}" for x in ("drop_path", "dropout:", "dtype:", "remat:"))


@dataclass(frozen=True)
class InitialState:
    """The state of step 0, whose parts from another run's checkpoint are known to fit."""

    cfg: Config
    step_fn: TrainStep
    checkpoint: Checkpoint | None  # config.init.checkpoint
    like: dict  # its abstract parameters that are taken, on the mesh of the step

    @classmethod
    def open(cls, cfg: Config, step_fn: TrainStep) -> "InitialState":
        """Reads no array, so that a run that cannot start fails before anything is written.

        Raises:
          SetupError: config.init.checkpoint is missing, or holds another encoder than `cfg` names.
        """
        path, keep = cfg.init.checkpoint, cfg.init.head == "keep"
        if not path:
            return cls(cfg, step_fn, None, {})
        params = step_fn.state.params
        names = ["encoder", "head"] if keep else ["encoder"]
        if missing := [name for name in names if name not in params]:
            raise SetupError(
                f"config.init.checkpoint is {path!r}, but objective {cfg.objective.name!r} trains "
                f"no {' and no '.join(missing)} that could start from it."
            )
        try:
            checkpoint = Checkpoint.open(path)
        except SetupError as error:
            raise SetupError(f"config.init.checkpoint: {error}") from None
        theirs = checkpoint.config
        trained, leaves = theirs.objective.name, theirs.objective.leaves
        if leaves == "tokenizer":
            raise SetupError(
                f"config.init.checkpoint {path} is of objective {trained!r}, which trains a "
                f"tokenizer and no encoder. Name another run."
            )
        if keep and leaves != cfg.objective.leaves:
            raise SetupError(
                f"config.init.head is 'keep', but {path} is of objective {trained!r}, which trains "
                f"no head of that kind. Set config.init.head to 'new'."
            )
        there, here = _encoder_config(theirs), _encoder_config(cfg)
        if changed := [x for x in differences(there, here) if not x.startswith(MAY_DIFFER)]:
            raise SetupError(
                f"config.init.checkpoint {path} holds another encoder: {'; '.join(changed)} "
                f"(there; here). Set these as they are there, or start from another checkpoint."
            )
        if keep and theirs.data.num_classes != cfg.data.num_classes:
            raise SetupError(
                f"config.init.head is 'keep', but {path} has {theirs.data.num_classes} classes "
                f"and config.data.num_classes is {cfg.data.num_classes}. Set config.init.head to "
                f"'new'."
            )
        like = {name: params[name] for name in names}
        if cfg.model.positions == "learned":
            here = params["encoder"]["positions"]
            shape = (side(theirs) ** 2, cfg.model.width)
            there = jax.ShapeDtypeStruct(shape, here.dtype, sharding=here.sharding)
            like["encoder"] = like["encoder"] | {"positions": there}
        checkpoint.check_params(like)
        return cls(cfg, step_fn, checkpoint, like)

    def make(self) -> TrainState:
        """The state, laid out like that of the step; the optimizer has not seen anything."""
        fresh = self.step_fn.init(jax.random.key(self.cfg.seed))
        if self.checkpoint is None:
            return fresh
        taken = self.checkpoint.restore_params(self.like)
        if self.cfg.model.positions == "learned":
            wanted = self.step_fn.state.params["encoder"]["positions"]
            resize = jax.jit(resized, static_argnums=1, out_shardings=wanted.sharding)
            taken["encoder"]["positions"] = resize(taken["encoder"]["positions"], side(self.cfg))
        params = fresh.params | taken
        return fresh.replace(params=params, ema=jax.tree.map(jnp.copy, params) if fresh.ema else {})


def _encoder_config(cfg: Config) -> dict:
    """All of the config that makes the encoder, with the grid of fixed positions written out."""
    model = section(cfg.model)
    if cfg.model.positions == "sincos2d":
        model["position_grid"] = cfg.model.position_grid or side(cfg)
    return {"model": model, "data": {"channels": cfg.data.channels}}


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
