"""Which checkpoints are kept: the newest, one every so many steps, and the best one."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import orbax.checkpoint as ocp
from etils import epath

from supmim_jax import metrics
from supmim_jax.config import CheckpointConfig
from supmim_jax.errors import SetupError


class Best:
    """Knows the checkpoint with the highest value of an evaluation's metric, if `metric` names one.

    What was measured before this process is read from metrics.jsonl.
    """

    def __init__(self, metric: str, workdir: epath.Path):
        self.metric, name, path = metric, f"eval/{metric}", workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if metric and path.exists() else []
        self.values = {x["step"]: x[name] for x in map(metrics.values, lines) if name in x}

    def measured(self, step: int, results: dict[str, float]) -> None:
        """Records the results of the evaluation after `step`.

        Raises:
          SetupError: the metric is not among it.
        """
        if not self.metric:
            return
        if self.metric not in results:
            raise SetupError(
                f"config.checkpoint.keep_best is {self.metric!r}, but the evaluation gives "
                f"{', '.join(results) or 'nothing'}. Name one of these, or leave it empty."
            )
        self.values[step] = results[self.metric]

    def step(self, among: list[int]) -> int | None:
        """The best of these steps, the newest of equals; None if none was evaluated."""
        # Of all metrics of an evaluation more is better: shares that are right, dB, codes in use.
        known = [(self.values[s], s) for s in among if math.isfinite(self.values.get(s, math.nan))]
        return max(known)[1] if known else None


@dataclass
class Policy(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps what any rule of `cfg` keeps, and the newest checkpoint that was `scheduled`.

    A run rolls back to that one; repeated SIGTERMs would otherwise push it out.
    """

    cfg: CheckpointConfig
    best: Best
    scheduled: Callable[[int], bool]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For orbax, which asks as each save begins."""
        steps, every = [x.step for x in checkpoints], self.cfg.keep_every
        kept = {*steps[-self.cfg.keep :], self.best.step(steps)}
        kept.add(max(filter(self.scheduled, steps), default=None))
        return [step in kept or (every > 0 and step % every == 0) for step in steps]
