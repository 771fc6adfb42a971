"""SupMIM ViT-B/14 on ImageNet-1k: configs/supervised_b14_imagenet1k.py plus the masked branch.

  python -m supmim_jax.train --config configs/supmim_b14_imagenet1k.py --workdir gs://...

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 81.72 % (paper: arXiv 2312.00950); not measured here.
"""

from configs import base, supervised_b14_imagenet1k
from supmim_jax.config import Config


def experiment() -> Config:
    return base.with_masked_branch(supervised_b14_imagenet1k.experiment(), base.SUPMIM)


def get_config(arg: str = ""):
    return base.finish(experiment(), arg)
