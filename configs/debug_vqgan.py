"""configs/debug.py with the tokens of a trained tokenizer as the target.

  python -m supmim_jax.train --config configs/vqgan_debug.py --workdir runs/vqgan
  python -m supmim_jax.train --config configs/debug_vqgan.py --workdir runs/supmim_vqgan \
      --config.objective.target.path=runs/vqgan

Hardware: 2 CPU cores.
"""

import dataclasses

from configs import base, debug, vqgan_debug
from supmim_jax.config import Config


def experiment() -> Config:
    config = debug.experiment()
    objective = dataclasses.replace(config.objective, target=vqgan_debug.TOKENIZER)
    return dataclasses.replace(config, objective=objective)


def get_config(arg: str = ""):
    return base.finish(experiment(), arg)
