"""Fine-tunes the encoder of configs/debug.py to name the class of each pixel of the built-in data.

  python -m supmim_jax.train --config configs/debug.py --workdir runs/supmim
  python -m supmim_jax.train --config configs/finetune_segmentation_debug.py --workdir runs/masks

Hardware: 2 CPU cores. Another checkpoint: --config.init.checkpoint=<its --workdir>[@step].
Validation mIoU, measured here from seed 0 of configs/debug.py: 23.6, 36.6 and 37.2 % with a
learning rate of 2e-4, 1e-3 and 3e-3 (one run each; a convolutional head on its frozen tokens:
36.2 %, by configs/probes/fractals.py). The other values are our choices, made without a search.
"""

from configs import finetune_debug
from supmim_jax import config as c


def experiment() -> c.Config:
    return c.changed(
        finetune_debug.experiment(),
        objective=c.SegmentationObjectiveConfig(head="conv"),
        init=c.InitConfig(checkpoint="runs/supmim"),
        optim={"lr": 3e-3},
        eval=c.EvalConfig(which=("miou",)),
    )
