"""SupMIM on scenic's recipe: configs/supervised_b14_imagenet1k_scenic.py and the masked branch.

  python -m supmim_jax.train --config configs/supmim_b14_imagenet1k_scenic.py --workdir gs://... \
      --config.tokens.cache=gs://.../tokens

The cache is written as in configs/supmim_b14_imagenet1k.py.
Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 81.72 % (paper: arXiv 2312.00950), very likely of this recipe; not measured here.
"""

from configs import base, supervised_b14_imagenet1k_scenic
from supmim_jax.config import Config


def experiment() -> Config:
    return base.with_masked_branch(supervised_b14_imagenet1k_scenic.experiment(), base.SUPMIM)
