"""Supervised ViT-B/14 on ImageNet-1k, AugReg-like: the baseline that SupMIM is compared with.

  python -m supmim_jax.train --config configs/supervised_b14_imagenet1k.py --workdir gs://...

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 79.71 % (paper: arXiv 2312.00950, 81.72 - 2.01); not measured here.
Recipe: scenic's imagenet_augreg_vit_config.py (arXiv 2106.10270) without its dropout of 0.1 and
with softmax in place of sigmoid: our choice, as is patch 14 with average pooling (256 tokens).
"""

from configs import base
from supmim_jax.config import ClassificationConfig, Config, OptimConfig, SupervisedConfig, ViTConfig


def experiment() -> Config:
    mixing = ClassificationConfig(mixup=0.5, mixup_larger=True)
    return Config(
        batch_size=4096,
        epochs=300,
        data=base.IMAGENET_1K,
        model=ViTConfig.variant("B", patch=14, drop_path=0.1, **base.AT_SCALE),
        objective=SupervisedConfig(classification=mixing),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_epochs=32),  # 10,000 steps
        eval=base.EVAL_AT_SCALE,
    )
