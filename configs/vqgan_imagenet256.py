"""An image tokenizer of MaskGIT's shape on ImageNet-1k: 256 px to 16 x 16 of 1024 codes.

  python -m supmim_jax.train --config configs/vqgan_imagenet256.py --workdir gs://.../vqgan \
      --config.objective.perceptual.checkpoint=gs://.../b16_256

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
Not trained by us. The perceptual checkpoint is a run with this config's `model` section at 256 px,
supervised for instance; with perceptual.weight=0 none is needed, and images come back softer.
"""

from configs import base
from supmim_jax import config as c


def experiment() -> c.Config:
    return c.Config(
        batch_size=256,
        epochs=200,
        data=c.changed(base.IMAGENET_1K_CROPS, image_size=256, eval_resize=256, min_crop_area=0.5),
        model=c.ViTConfig.variant("B", patch=16, **base.AT_SCALE),
        # Network, losses and optimizer: MaskGIT's vqgan_config.py (docs/recipes.md has each value).
        # Its R1 penalty of 10 is on the squared gradient; ours is on half of that.
        objective=c.VQGANObjectiveConfig(
            tokenizer=c.VQGANConfig(),
            perceptual=c.PerceptualConfig(weight=0.1, checkpoint="PATH OF A RUN"),
            adversarial=c.AdversarialConfig(weight=0.1, r1_weight=20.0, start=0.25),
        ),
        optim=c.OptimConfig(lr=1e-4, b1=0.0, b2=0.99, weight_decay=0.0, warmup_epochs=1, ema=0.999),
        eval=base.EVAL_AT_SCALE,
    )
