"""SupMIM ViT-L/14 on ImageNet-21k: configs/supervised_l14_imagenet21k.py plus the masked branch.

  python -m supmim_jax.train --config configs/supmim_l14_imagenet21k.py --workdir gs://... \
      --config.objective.target.path=gs://.../tokenizer_imagenet256_checkpoint

Tokens are made in the step: for a model of this size a cache spares little.
Hardware: a TPU pod; with `:debug` after the file name, any machine.
Number: none published for this model and patch; not measured here.
"""

from configs import base, supervised_l14_imagenet21k
from supmim_jax.config import Config


def experiment() -> Config:
    return base.with_masked_branch(supervised_l14_imagenet21k.experiment(), base.SUPMIM)
