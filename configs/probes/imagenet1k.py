"""kNN, retrieval, linear probe and few-shot on ImageNet-1k; top-1 too, of an encoder trained on it.

  python -m supmim_jax.probe --config configs/probes/imagenet1k.py --checkpoint runs/b14

Hardware: a GPU or a TPU slice (ViT-B's features of 1.28 million images are 3.9 GB on the devices
together); not run by us. First `python -m supmim_jax.data.prepare --name imagenet2012`.
"""

from configs import base
from supmim_jax.config import EvalConfig, ProbeConfig


def experiment() -> ProbeConfig:
    data = base.probed("imagenet2012", 1000, "validation", workers=16, threads=16)
    which = ("top1", "knn", "retrieval", "linear", "few_shot")
    evaluations = EvalConfig(batch_size=2048, which=which, knn=base.KNN_SWEEP)
    return ProbeConfig(data=data, eval=evaluations)
