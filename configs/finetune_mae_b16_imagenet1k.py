"""Fine-tunes the ViT-B/16 of configs/mae_b16_imagenet1k.py on the labels.

  python -m supmim_jax.train --config configs/finetune_mae_b16_imagenet1k.py --workdir gs://... \
      --config.init.checkpoint=<workdir of the run to start from>

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 83.6 % after 1600 epochs of MAE (paper: arXiv 2111.06377); not measured here. Recipe: the
paper's appendix A.1 and, where that gives a range, its code's README for ViT-B, but from the CLS
token: our choice.
"""

from configs import base, mae_b16_imagenet1k
from supmim_jax.config import Config


def experiment() -> Config:
    return base.fine_tuned(mae_b16_imagenet1k.experiment(), "runs/mae_b16_imagenet1k")
