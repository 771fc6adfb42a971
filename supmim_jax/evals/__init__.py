"""One evaluation path: training and `probe` call the same `run_all` on an encoder."""

from jax.sharding import Mesh

from supmim_jax.batch import Encoder, Tokenizer
from supmim_jax.data.loader import Dataset
from supmim_jax.evals import evaluate
from supmim_jax.evals.evaluate import check
from supmim_jax.evals.features import ERRORS, Results

__all__ = ["ERRORS", "Results", "check", "run_all", "told"]


def told(errors: dict[str, str], where: str) -> str:
    """What a command says at its end of evaluations that could not be made."""
    reasons = " ".join(f"{name}: {reason}" for name, reason in errors.items())
    return (
        f"{where} has all other results, but not {', '.join(errors)}. {reasons} The same command "
        f"measures again once the data or config.eval are changed."
    )


def run_all(model: Encoder | Tokenizer, dataset: Dataset, split: str, mesh: Mesh) -> Results:
    """What a run is judged by on `split`, with every example counted once, on any mesh.

    Raises:
      SetupError: the data are not what an evaluation of `config.eval.which` needs.
    """
    if dataset.cfg.objective.leaves == "tokenizer":
        return Results(evaluate.reconstruction_measure(model, dataset, split, mesh), {})
    return evaluate.measure(model, dataset, split, mesh)
