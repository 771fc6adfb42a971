"""configs/debug.py with the tokens of a trained tokenizer as the target.

  python -m supmim_jax.train --config configs/vqgan_debug.py --workdir runs/vqgan
  python -m supmim_jax.train --config configs/debug_vqgan.py --workdir runs/supmim_vqgan \
      --config.objective.target.path=runs/vqgan

Hardware: 2 CPU cores.
"""

from configs import debug, vqgan_debug
from supmim_jax.config import Config, changed


def experiment() -> Config:
    return changed(debug.experiment(), objective={"target": vqgan_debug.TOKENIZER})
