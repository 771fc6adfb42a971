"""One evaluation path: training and `probe` call the same `run_all` on an encoder."""

from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.data import pipeline
from supmim_jax.evals import features, knn, reconstruction
from supmim_jax.types import Encoder, Tokenizer


def run_all(model: Encoder | Tokenizer, cfg: Config, split: str, mesh: Mesh) -> dict[str, float]:
    """What a run of `cfg` is judged by on `split`, with every example counted once, on any mesh."""
    measure = reconstruction.measure if cfg.objective.name == "vqgan" else representation
    return measure(model, cfg, split, mesh)


def representation(encoder: Encoder, cfg: Config, split: str, mesh: Mesh) -> dict[str, float]:
    """Top-1 of the classifier and of kNN, in per cent; kNN votes with the train split."""
    bank = features.extract(encoder, pipeline.eval_dataset(cfg, cfg.data.train_split, mesh))
    queries = features.extract(encoder, pipeline.eval_dataset(cfg, split, mesh))
    votes = knn.predict(
        queries.pooled,
        bank.pooled,
        bank.label,
        classes=cfg.data.num_classes,
        k=min(cfg.eval.knn_k, len(bank.label)),
        temperature=cfg.eval.knn_temperature,
        mesh=mesh,
    )
    return {
        "top1": 100.0 * float((queries.prediction == queries.label).mean()),
        "knn": 100.0 * float((votes == queries.label).mean()),
    }
