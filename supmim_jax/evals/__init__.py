"""One evaluation path: training and `probe` call the same `run_all` on an encoder."""

from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.evals import reconstruction, representation
from supmim_jax.evals.needs import check
from supmim_jax.evals.results import ERRORS, Results
from supmim_jax.types import Encoder, Tokenizer

__all__ = ["ERRORS", "Results", "check", "run_all", "told"]


def told(errors: dict[str, str], where: str) -> str:
    """What a command says at its end of evaluations that could not be made."""
    reasons = " ".join(f"{name}: {reason}" for name, reason in errors.items())
    return (
        f"{where} has all other results, but not {', '.join(errors)}. {reasons} The same command "
        f"measures again once the data or config.eval are changed."
    )


def run_all(model: Encoder | Tokenizer, cfg: Config, split: str, mesh: Mesh) -> Results:
    """What a run of `cfg` is judged by on `split`, with every example counted once, on any mesh.

    Raises:
      SetupError: the data are not what an evaluation of `cfg.eval.which` needs.
    """
    if cfg.objective.name == "vqgan":
        return Results(reconstruction.measure(model, cfg, split, mesh), {})
    return representation.measure(model, cfg, split, mesh)
