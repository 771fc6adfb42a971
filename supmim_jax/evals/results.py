"""What evaluations give."""

from typing import Any, NamedTuple

from supmim_jax.config import SetupError

ERRORS = "errors"  # in results.json, where there are any


class CannotEvaluate(SetupError):
    """One evaluation cannot be made of what was read, which is the same on all processes."""


class Results(NamedTuple):
    metrics: dict[str, float]
    details: dict[str, Any]  # by evaluation: what is no metric, ready for JSON
    errors: dict[str, str] = {}  # why an evaluation could not be made, by its name
