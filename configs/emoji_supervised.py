"""Supervised ViT on emoji_designs: 912 emoji as six designers drew them (docs/data.md).

  python -m supmim_jax.train --config configs/emoji_supervised.py --workdir runs/emoji

Hardware: 2 CPU cores. First make the data, as docs/data.md says. It is evaluated on a designer that
training has not seen. All values are our choices; the learning rate is the best of four
(configs/studies/emoji_learning_rate.py).
"""

from configs import debug_supervised
from supmim_jax import config as c


def experiment() -> c.Config:
    return c.Config(
        batch_size=64,
        epochs=20,  # 1,318 steps
        data=c.DataConfig(
            name="emoji_designs",
            train_examples=4216,
            num_classes=912,
            image_size=32,
            eval_resize=32,
            channels=3,
            crop="inception",
            min_crop_area=0.3,
            flip=False,  # left and right are classes
            augment="color_jitter",
        ),
        model=c.ViTConfig(
            patch=4,
            width=96,
            depth=4,
            mlp_dim=384,
            heads=3,
            positions="sincos2d",
            gelu="tanh",  # costs less on a CPU
        ),
        objective=debug_supervised.OBJECTIVE,
        optim=c.OptimConfig(lr=4e-3, weight_decay=0.05, warmup_epochs=2),
    )
