"""One evaluation path: training and `probe` call the same `run_all` on an encoder."""

from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.evals import reconstruction, representation
from supmim_jax.evals.results import Results
from supmim_jax.types import Encoder, Tokenizer


def run_all(model: Encoder | Tokenizer, cfg: Config, split: str, mesh: Mesh) -> Results:
    """What a run of `cfg` is judged by on `split`, with every example counted once, on any mesh.

    Raises:
      SetupError: the data are not what an evaluation of `cfg.eval.which` needs.
    """
    if cfg.objective.name == "vqgan":
        return Results(reconstruction.measure(model, cfg, split, mesh), {})
    return representation.measure(model, cfg, split, mesh)
