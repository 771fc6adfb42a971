"""Which checkpoints are kept: the newest, one every so many steps, and the best one."""

import json
import math
from collections.abc import Callable

import orbax.checkpoint as ocp
from etils import epath

from supmim_jax.config import CheckpointConfig
from supmim_jax.errors import SetupError

policies = ocp.checkpoint_managers


class Best(policies.PreservationPolicy):
    """Keeps the checkpoint with the highest value of an evaluation's metric.

    What was measured before this process is read from metrics.jsonl.
    """

    def __init__(self, metric: str, workdir: epath.Path):
        self.metric = metric
        self.values = _measured(workdir / "metrics.jsonl", metric) if metric else {}

    def measured(self, step: int, metrics: dict[str, float]) -> None:
        """Records the results of the evaluation after `step`.

        Raises:
          SetupError: the metric is not among it.
        """
        if not self.metric:
            return
        if self.metric not in metrics:
            raise SetupError(
                f"config.checkpoint.keep_best is {self.metric!r}, but the evaluation gives "
                f"{', '.join(metrics) or 'nothing'}. Name one of these, or leave it empty."
            )
        self.values[step] = metrics[self.metric]

    def step(self, among: list[int]) -> int | None:
        """The best of these steps, the newest of equals; None if none was evaluated."""
        # Of all metrics of an evaluation more is better: shares that are right, dB, codes in use.
        known = [(self.values[s], s) for s in among if math.isfinite(self.values.get(s, math.nan))]
        return max(known)[1] if known else None

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For orbax, which asks as each save begins."""
        best = self.step([x.step for x in checkpoints])
        return [x.step == best for x in checkpoints]


class NewestScheduled(policies.PreservationPolicy):
    """Keeps what a run rolls back to; otherwise repeated SIGTERMs would push it out."""

    def __init__(self, scheduled: Callable[[int], bool]):
        self.scheduled = scheduled

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For orbax, which asks as each save begins."""
        newest = max((x.step for x in checkpoints if self.scheduled(x.step)), default=None)
        return [x.step == newest for x in checkpoints]


def policy(
    cfg: CheckpointConfig, best: Best, scheduled: Callable[[int], bool]
) -> policies.PreservationPolicy:
    """Keeps what any rule of `cfg` keeps, and the newest scheduled checkpoint."""
    rules = [policies.LatestN(cfg.keep), best, NewestScheduled(scheduled)]
    if cfg.keep_every:
        rules.append(policies.EveryNSteps(cfg.keep_every))
    return policies.AnyPreservationPolicy(rules)


def _measured(path: epath.Path, metric: str) -> dict[int, float]:
    """Values of an evaluation's metric by step; truncated lines are ignored."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            values = json.loads(line)
            found[values["step"]] = float(values[f"eval/{metric}"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
