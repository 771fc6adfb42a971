"""Retrieval of products that no image of training shows: Recall@1, 10, 100, 1000 and mAP@R.

  python -m supmim_jax.probe --config configs/probes/stanford_online_products.py \
      --checkpoint runs/b14

Hardware: one GPU; not run by us. First `python -m supmim_jax.data.prepare --name
stanford_online_products`. The test split's 11,316 products search each other.
"""

from configs import base
from supmim_jax.config import EvalConfig, ProbeConfig, RetrievalConfig


def experiment() -> ProbeConfig:
    data = base.probed("stanford_online_products", 22_634, "test", label_field="class_id")
    recalls = RetrievalConfig(recalls=(1, 10, 100, 1000))
    evaluations = EvalConfig(which=("retrieval",), retrieval=recalls)
    return ProbeConfig(data=data, eval=evaluations)
