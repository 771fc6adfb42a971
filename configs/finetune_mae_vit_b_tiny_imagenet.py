"""Fine-tunes the ViT-B/8 of configs/mae_vit_b_tiny_imagenet.py or of CMAE's on the labels.

  python -m supmim_jax.train --config configs/finetune_mae_vit_b_tiny_imagenet.py \
      --config.init.checkpoint=runs/cmae_b_tiny --workdir runs/cmae_b_tiny_finetuned

Hardware: one GPU or more; with `:debug` after the file name, any machine.
Top-1: 62.95 % from MAE, 65.84 % from CMAE (paper: arXiv 2205.10546); not measured here. Recipe:
that of configs/finetune_mae_b16_imagenet1k.py, our choice.
"""

from configs import base, mae_vit_b_tiny_imagenet
from supmim_jax.config import Config


def experiment() -> Config:
    return base.fine_tuned(mae_vit_b_tiny_imagenet.experiment(), "runs/mae_b_tiny")
