"""The paper's baseline as scenic would train it: AugReg's recipe (scenic) with patches of 14.

  python -m supmim_jax.train --config configs/supervised_b14_imagenet1k_scenic.py --workdir gs://...

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 79.71 % (paper: arXiv 2312.00950), very likely of this recipe; not measured here.
"""

from configs import supervised_b16_imagenet1k_scenic
from supmim_jax.config import Config, changed


def experiment() -> Config:
    return changed(supervised_b16_imagenet1k_scenic.experiment(), model={"patch": 14})
