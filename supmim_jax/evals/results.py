"""What evaluations give."""

from typing import Any, NamedTuple


class Results(NamedTuple):
    metrics: dict[str, float]
    details: dict[str, Any]  # by evaluation: what is no metric, ready for JSON
