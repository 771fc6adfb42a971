"""The training methods by name. Each is an nnx.Module with `loss(batch, key)`."""

from supmim_jax.objectives.supervised import Supervised
from supmim_jax.objectives.supmim import SupMIM

OBJECTIVES = {"supervised": Supervised, "supmim": SupMIM}
