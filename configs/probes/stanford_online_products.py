"""Retrieval of products that no image of training shows: Recall@1, 10, 100, 1000 and mAP@R.

  python -m supmim_jax.probe --config configs/probes/stanford_online_products.py \
      --checkpoint runs/b14

Hardware: one GPU; not run by us. First `python -m supmim_jax.data.prepare --name
stanford_online_products`. The test split's 11,316 products search each other.
"""

from supmim_jax.config import EvalConfig, ProbeConfig, ProbeDataConfig, RetrievalConfig


def experiment() -> ProbeConfig:
    data = ProbeDataConfig(
        name="stanford_online_products",
        train_split="train",
        eval_split="test",
        num_classes=22_634,
        label_field="class_id",
    )
    evaluations = EvalConfig(
        which=("retrieval",), retrieval=RetrievalConfig(recalls=(1, 10, 100, 1000))
    )
    return ProbeConfig(data=data, eval=evaluations)
