"""Supervised ViT-L/14 on ImageNet-21k.

  python -m supmim_jax.train --config configs/supervised_l14_imagenet21k.py --workdir gs://...

Hardware: a TPU pod; with `:debug` after the file name, any machine.
Number: none published for this model and patch; not measured here.
tfds has no public imagenet21k. Make one of its images (14,197,122 in 21,841 classes: Ridnik et al.,
arXiv 2104.10972), and set config.data.train_examples and num_classes to what the command prints:
  python -m supmim_jax.data.prepare --image_folder <dir with train/<class>/> --as imagenet21k \
      --val_fraction=0.0036
The recipe is our choice, after AugReg (arXiv 2106.10270).
"""

from configs import base
from supmim_jax.config import ClassificationConfig, Config, OptimConfig, SupervisedConfig, ViTConfig


def experiment() -> Config:
    classification = ClassificationConfig(loss="sigmoid", mixup=0.2, mixup_larger=True)
    return Config(
        batch_size=4096,
        epochs=90,
        data=base.IMAGENET_21K,
        model=ViTConfig.variant("L", patch=14, drop_path=0.1, **base.AT_SCALE),
        objective=SupervisedConfig(classification=classification),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1, warmup_epochs=3),
        eval=base.EVAL_AT_SCALE,
    )
