"""SupMIM by DeiT-III's recipe: configs/supervised_b14_imagenet1k_deit3.py and the masked branch.

  python -m supmim_jax.train --config configs/supmim_b14_imagenet1k_deit3.py --workdir gs://... \
      --config.tokens.cache=gs://.../tokens --config.tokens.views=400

The cache is written as in configs/supmim_b14_imagenet1k.py, with --epochs 400. Repeated
augmentation shows 1,200 crops of an image; tokens.views cycles through the cache's 400.
Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Number: none published; not measured here. What to beat: MaskSub on DeiT-III B, +0.6 at 400 epochs.
"""

from configs import base, supervised_b14_imagenet1k_deit3
from supmim_jax.config import Config, changed


def experiment() -> Config:
    # DeiT-III's loss is a mean over 1,000 classes: the token loss, in nats, is brought to its size.
    supmim = changed(base.SUPMIM, mim_weight=1e-3)
    return base.with_masked_branch(supervised_b14_imagenet1k_deit3.experiment(), supmim)
