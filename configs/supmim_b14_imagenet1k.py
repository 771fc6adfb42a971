"""SupMIM ViT-B/14 on ImageNet-1k: configs/supervised_b14_imagenet1k.py plus the masked branch.

  python -m supmim_jax.cache_tokens --config configs/supmim_b14_imagenet1k.py --epochs 300 \
      --cache gs://.../tokens --config.objective.target.path=gs://.../tokenizer_imagenet256_checkpoint
  python -m supmim_jax.train --config configs/supmim_b14_imagenet1k.py --workdir gs://... \
      --config.tokens.cache=gs://.../tokens

The first command computes MaskGIT's tokens once; without a cache, and with target.path, the step
does so itself, at 30 % of its FLOPs (docs/tokens.md).
Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 81.72 % (paper: arXiv 2312.00950); not measured here.
"""

from configs import base, supervised_b14_imagenet1k
from supmim_jax.config import Config


def experiment() -> Config:
    return base.with_masked_branch(supervised_b14_imagenet1k.experiment(), base.SUPMIM)
