"""configs/debug.py with each patch's normalised pixels as the target, as in MAE.

  python -m supmim_jax.train --config configs/debug_pixels.py --workdir runs/supmim_pixels

Hardware: 2 CPU cores.
"""

from configs import debug
from supmim_jax.config import Config, PixelsConfig, changed


def experiment() -> Config:
    return changed(debug.experiment(), objective={"target": PixelsConfig()})
