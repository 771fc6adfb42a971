"""Supervised ViT-g/14 on ImageNet-21k.

  python -m supmim_jax.train --config configs/supervised_g14_imagenet21k.py --workdir gs://...

Hardware: a TPU pod; with `:debug` after the file name, any machine.
Number: none published for this model and patch; not measured here.
Data and recipe are those of configs/supervised_l14_imagenet21k.py.
"""

from configs import base, supervised_l14_imagenet21k
from supmim_jax.config import Config, ViTConfig, changed


def experiment() -> Config:
    model = ViTConfig.variant("g", patch=14, drop_path=0.1, **base.AT_SCALE)
    return changed(supervised_l14_imagenet21k.experiment(), model=model)
