"""Fine-tunes the ViT-B/16 of configs/mae_b16_imagenet1k.py on the labels.

  python -m supmim_jax.train --config configs/finetune_mae_b16_imagenet1k.py --workdir gs://... \
      --config.init.checkpoint=<workdir of the run to start from>

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 83.6 % after 1600 epochs of MAE (paper: arXiv 2111.06377); not measured here. Recipe: the
paper's appendix A.1 and, where that gives a range, its code's README for ViT-B, but from the CLS
token: our choice.
"""

import dataclasses

from configs import base, mae_b16_imagenet1k
from supmim_jax.config import Config, InitConfig


def experiment() -> Config:
    config = base.fine_tuned(mae_b16_imagenet1k.experiment(), InitConfig("runs/mae_b16_imagenet1k"))
    return dataclasses.replace(config, batch_size=1024, epochs=100)


def get_config(arg: str = ""):
    return base.finish(experiment(), arg)
