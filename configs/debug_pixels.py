"""configs/debug.py with each patch's normalised pixels as the target, as in MAE.

  python -m supmim_jax.train --config configs/debug_pixels.py --workdir runs/supmim_pixels

Hardware: 2 CPU cores.
"""

import dataclasses

from configs import base, debug
from supmim_jax.config import Config, PixelsConfig


def experiment() -> Config:
    config = debug.experiment()
    objective = dataclasses.replace(config.objective, target=PixelsConfig())
    return dataclasses.replace(config, objective=objective)


def get_config(arg: str = ""):
    return base.finish(experiment(), arg)
