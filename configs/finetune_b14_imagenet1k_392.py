"""Fine-tunes the ViT-B/14 of supmim_b14_imagenet1k_deit3 at 392 px, 28 x 28 patches.

  python -m supmim_jax.train --config configs/finetune_b14_imagenet1k_392.py --workdir gs://... \
      --config.init.checkpoint=<workdir of the run to start from>

Hardware: a TPU slice or several GPUs; with `:debug` after the file name, any machine.
DeiT-III's 20 epochs of AdamW with rand-m9-mstd0.5-inc1 in place of 3-Augment (arXiv 2204.07118, its
README_revenge.md), and MAE's decay of the learning rate by layer (arXiv 2111.06377). Every other
value is our choice; not measured.
"""

from configs import base, supervised_b14_imagenet1k_deit3
from supmim_jax import config as c


def experiment() -> c.Config:
    mixed = c.ClassificationConfig(mixup=0.8, cutmix=1.0, label_smoothing=0.1)
    return c.changed(
        supervised_b14_imagenet1k_deit3.experiment(),
        batch_size=512,
        epochs=20,
        data={"image_size": 392, "eval_resize": 392, **base.TIMM_RAND_AUGMENT},
        model={"position_grid": 16, "drop_path": 0.2},
        objective={"classification": mixed},
        init=c.InitConfig(checkpoint="runs/supmim_b14_imagenet1k_deit3", head="keep"),
        optim=c.OptimConfig(lr=5e-5, weight_decay=0.1, warmup_epochs=2, layer_decay=0.75),
    )
