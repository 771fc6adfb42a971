"""All evaluations on the built-in data, segmentation of their figures included.

  python -m supmim_jax.probe --config configs/probes/fractals.py --checkpoint runs/supmim

Hardware: 2 CPU cores. `fractals.py:small` takes another variant of the data than `tiny`.
"""

from configs import base
from supmim_jax import config as c
from supmim_jax.config.configdict import to_configdict
from supmim_jax.data.fractals import SPECS
from supmim_jax.errors import ConfigError


def get_config(variant: str = "tiny"):
    if variant not in SPECS:
        raise ConfigError(f"The config argument {variant!r} is unknown; known: {', '.join(SPECS)}.")
    classes = SPECS[variant].num_classes
    masks = c.MasksConfig(field="segmentation", num_classes=classes + 1)  # 0: ground
    evaluations = c.EvalConfig(
        which=("top1", "knn", "retrieval", "linear", "few_shot", "segmentation"),
        knn=base.KNN_SWEEP,
        few_shot=c.FewShotConfig(shots=5),  # tiny has 8 images of a class
    )
    data = base.probed(f"fractals/{variant}", classes, "validation", masks=masks)
    return to_configdict(c.ProbeConfig(data=data, eval=evaluations))
