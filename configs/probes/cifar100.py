"""kNN, linear probe and few-shot on CIFAR-100, enlarged to the encoder's image size.

  python -m supmim_jax.probe --config configs/probes/cifar100.py --checkpoint runs/b14

Hardware: one GPU; not run by us. First `python -m supmim_jax.data.prepare --name cifar100`.
"""

from configs.probes import base
from supmim_jax.config import EvalConfig, ProbeConfig, ProbeDataConfig


def experiment() -> ProbeConfig:
    data = ProbeDataConfig(
        name="cifar100",
        train_split="train",
        eval_split="test",
        num_classes=100,
        label_field="label",
    )
    evaluations = EvalConfig(which=("top1", "knn", "linear", "few_shot"), knn=base.KNN_SWEEP)
    return ProbeConfig(data=data, eval=evaluations)
