"""Supervised ViT-B/16 on ImageNet-1k as scenic's baseline config has it: AugReg's recipe.

  python -m supmim_jax.train --config configs/supervised_b16_imagenet1k_scenic.py --workdir gs://...

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Top-1: 79.7 % (scenic's README, ViT-AugReg-B/16); not measured here. Each value beside scenic's, and
what differs: docs/recipes.md.
"""

from configs import base
from supmim_jax.config import ClassificationConfig, Config, OptimConfig, SupervisedConfig, ViTConfig


def experiment() -> Config:
    classification = ClassificationConfig(loss="sigmoid", mixup=0.5)
    return Config(
        batch_size=4096,
        epochs=300,
        data=base.IMAGENET_1K,
        model=ViTConfig.variant(
            "B",
            patch=16,
            pooling="cls",
            positions="learned",
            drop_path=0.1,
            dropout=0.1,
            gelu="tanh",
            remat="names",
        ),
        objective=SupervisedConfig(classification=classification),
        optim=OptimConfig(
            lr=1e-3,
            weight_decay=0.1,
            decay_on="all",
            warmup_epochs=10_000 * 4096 / 1_281_167,  # 10,000 steps
            schedule="product",
        ),
        eval=base.EVAL_AT_SCALE,
    )
