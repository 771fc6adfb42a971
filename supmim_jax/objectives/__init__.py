"""The training methods by name. Each is an nnx.Module with `loss(batch, key)`."""

from supmim_jax.objectives.segmentation import Segmentation
from supmim_jax.objectives.supervised import Supervised
from supmim_jax.objectives.supmim import SupMIM
from supmim_jax.objectives.vqgan import VQGANTraining

OBJECTIVES = {
    "supervised": Supervised,
    "supmim": SupMIM,
    "segmentation": Segmentation,
    "vqgan": VQGANTraining,
}
