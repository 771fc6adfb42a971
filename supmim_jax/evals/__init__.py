"""One evaluation path: training and `probe` call the same `run_all` on an encoder."""

from supmim_jax.evals.evaluate import check, run_all, told
from supmim_jax.evals.features import ERRORS, Results

__all__ = ["ERRORS", "Results", "check", "run_all", "told"]
