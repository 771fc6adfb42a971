"""Classification and segmentation of Oxford-IIIT Pets.

  python -m supmim_jax.probe --config configs/probes/pets.py --checkpoint runs/b14

Hardware: one GPU; not run by us. First `python -m supmim_jax.data.prepare --name oxford_iiit_pet`.
The masks have 1 for the animal, 2 for the ground and 3 for the border between; all count.
"""

from configs import base
from supmim_jax import config as c


def experiment() -> c.ProbeConfig:
    masks = c.MasksConfig(field="segmentation_mask", num_classes=3, offset=-1)
    evaluations = c.EvalConfig(
        which=("top1", "knn", "linear", "few_shot", "segmentation"),
        knn=base.KNN_SWEEP,
        # 20 epochs: our choice.
        segmentation=c.SegmentationConfig(training=c.HeadTrainingConfig(steps=2300)),
    )
    data = base.probed("oxford_iiit_pet", 37, "test", masks=masks)
    return c.ProbeConfig(data=data, eval=evaluations)
