"""kNN, linear probe and few-shot on CIFAR-100, enlarged to the encoder's image size.

  python -m supmim_jax.probe --config configs/probes/cifar100.py --checkpoint runs/b14

Hardware: one GPU; not run by us. First `python -m supmim_jax.data.prepare --name cifar100`.
"""

from configs import base
from supmim_jax.config import EvalConfig, ProbeConfig


def experiment() -> ProbeConfig:
    evaluations = EvalConfig(which=("top1", "knn", "linear", "few_shot"), knn=base.KNN_SWEEP)
    return ProbeConfig(data=base.probed("cifar100", 100, "test"), eval=evaluations)
