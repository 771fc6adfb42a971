"""MAE (arXiv 2111.06377) on built-in images, without their labels.

  python -m supmim_jax.train --config configs/mae_fractals.py --workdir runs/mae

Hardware: 2 CPU cores. It learns from the 1,200 images of the validation split, so that the few
labelled ones of the training split (configs/finetune_mae_fractals.py) are new to it; what it is
worth is measured on the test split (docs/results.md). The decoder is to the encoder roughly as
MAE's is to ViT-B. All values are our choices, made without a search.
"""

from configs import debug_supervised
from supmim_jax import config as c


def experiment() -> c.Config:
    return c.changed(
        debug_supervised.experiment(),
        epochs=64,  # 1200 steps
        data={
            "train_split": "validation",
            "train_examples": 1200,
            "eval_split": "train",
            "image_size": 24,
            "crop": "inception",
            "min_crop_area": 0.2,  # MAE's
        },
        objective=c.MAEConfig(decoder=c.DecoderConfig(depth=3, width=48, mlp_dim=192, heads=2)),
        optim=c.OptimConfig(lr=2e-3, weight_decay=0.05, b2=0.95, warmup_epochs=5),
        eval=c.EvalConfig(which=("knn",)),
    )
