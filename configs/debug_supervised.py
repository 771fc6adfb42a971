"""The supervised twin of configs/debug.py: the same run without the masked branch.

  python -m supmim_jax.train --config configs/debug_supervised.py --workdir runs/supervised

Hardware: 2 CPU cores.
"""

from configs import base
from supmim_jax.config import ClassificationConfig, Config, OptimConfig, SupervisedConfig, ViTConfig

OBJECTIVE = SupervisedConfig(classification=ClassificationConfig(label_smoothing=0.1))


def experiment() -> Config:
    return Config(
        batch_size=64,
        epochs=640,  # 2400 steps
        data=base.FRACTALS,
        model=ViTConfig(patch=4, width=64, depth=4, mlp_dim=256, heads=2, positions="sincos2d"),
        objective=OBJECTIVE,
        optim=OptimConfig(lr=2e-3, weight_decay=0.05, b2=0.98, warmup_epochs=25),
    )
