"""MAE ViT-B/8 on Tiny-ImageNet: the baseline of CMAE (arXiv 2205.10546).

  python -m supmim_jax.data.prepare --image_folder tiny-imagenet-200 --as tiny_imagenet
  python -m supmim_jax.train --config configs/mae_vit_b_tiny_imagenet.py --workdir runs/mae_b_tiny

Hardware: one GPU or more; with `:debug` after the file name, any machine.
Fine-tuned top-1: 62.95 % (paper: arXiv 2205.10546, 65.84 - 2.89); not measured here.
Recipe: MAE's (arXiv 2111.06377, appendix A) for 300 epochs, as in the public code of CMAE's first
author. 64 px in patches of 8 are our choice, as the text that we have says nothing of it. Of those
64 tokens 16 are visible; patches of 16 would leave 4, and patches of 4 cost four times as much.
"""

from configs import base, mae_b16_imagenet1k
from supmim_jax.config import Config, changed


def experiment() -> Config:
    return changed(
        mae_b16_imagenet1k.experiment(),
        batch_size=1024,
        epochs=300,
        data=base.TINY_IMAGENET,
        model={"patch": 8},
    )
