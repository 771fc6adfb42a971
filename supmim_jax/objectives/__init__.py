"""The training methods by name.

Each is an nnx.Module with `loss(batch, key)`: the scalar loss of a batch, and its terms; `key` is
that of the step.
"""

from supmim_jax.objectives.cmae import CMAE
from supmim_jax.objectives.mae import MAE
from supmim_jax.objectives.segmentation import Segmentation
from supmim_jax.objectives.supervised import Supervised
from supmim_jax.objectives.supmim import SupMIM
from supmim_jax.objectives.vqgan import VQGANTraining

OBJECTIVES = {
    "supervised": Supervised,
    "supmim": SupMIM,
    "mae": MAE,
    "cmae": CMAE,
    "segmentation": Segmentation,
    "vqgan": VQGANTraining,
}
# What has `mask` and `predict` of an objective, with no parameters but those that these need.
PREDICTORS = OBJECTIVES | {"cmae": MAE}
