"""All evaluations on the built-in data, segmentation of their figures included.

  python -m supmim_jax.probe --config configs/probes/fractals.py --checkpoint runs/supmim

Hardware: 2 CPU cores. `fractals.py:small` takes another variant of the data than `tiny`.
"""

from configs.probes import base
from supmim_jax.config import EvalConfig, FewShotConfig, MasksConfig, ProbeConfig, ProbeDataConfig
from supmim_jax.config.configdict import to_configdict
from supmim_jax.data.fractals import SPECS
from supmim_jax.errors import ConfigError


def get_config(arg: str = ""):
    variant = arg or "tiny"
    if variant not in SPECS:
        raise ConfigError(f"The config argument {arg!r} is unknown; known: {', '.join(SPECS)}.")
    spec = SPECS[variant]
    data = ProbeDataConfig(
        name=f"fractals/{variant}",
        train_split="train",
        eval_split="validation",
        num_classes=spec.num_classes,
        label_field="label",
        masks=MasksConfig(field="segmentation", num_classes=spec.num_classes + 1),  # 0: ground
    )
    evaluations = EvalConfig(
        which=("top1", "knn", "retrieval", "linear", "few_shot", "segmentation"),
        knn=base.KNN_SWEEP,
        few_shot=FewShotConfig(shots=5),  # tiny has 8 images of a class
    )
    return to_configdict(ProbeConfig(data=data, eval=evaluations))
