"""Looks whether training is still finite."""

import jax
import numpy as np

from supmim_jax.batch import Batch, Metrics


class Diverged(Exception):
    """A loss term or the gradient is no longer finite, in `step`."""

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class NanGuard:
    """Looks at each step's metrics one step late, so that the device is never kept waiting."""

    def __init__(self):
        self.pending: tuple[int, Metrics, jax.Array] | None = None

    def __call__(self, step: int, metrics: Metrics, batch: Batch) -> None:
        """Checks the step before and remembers this one.

        Raises:
          Diverged: a value is NaN or infinite; names the step, its terms and the ids.
        """
        self.flush()
        self.pending = (step, metrics, batch.id)

    def flush(self) -> None:
        """Checks the remembered step, so that no poisoned state is saved or reported."""
        if self.pending is None:
            return
        (step, metrics, ids), self.pending = self.pending, None
        values = {name: float(value) for name, value in metrics.items()}
        if np.isfinite(list(values.values())).all():
            return
        local = np.concatenate([np.asarray(shard.data) for shard in ids.addressable_shards])
        raise Diverged(
            f"Step {step} is not finite: {', '.join(f'{k}={v:g}' for k, v in values.items())}. "
            f"Ids of its batch: {', '.join(map(str, np.unique(local)))}. Nothing of this step was "
            f"saved. Lower config.optim.lr or set config.optim.clip (with another --workdir), or "
            f"look at these examples. config.watch.roll_backs lets a run leave batches out.",
            step,
        )
