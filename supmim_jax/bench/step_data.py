"""The step fed by the run's own input pipeline: what share of the time waits for data."""

import contextlib
import time

import jax

from supmim_jax.bench.step_timing import WARM_UP, Ours
from supmim_jax.config import Config
from supmim_jax.data import loader
from supmim_jax.errors import SetupError


def measure(cfg: Config, mesh: jax.sharding.Mesh, ours: Ours, steps: int) -> dict[str, float]:
    """Seconds of a step as `train` feeds it, and of these the seconds that nothing was there.

    As in training the host is one step ahead of the devices, so what was made while they computed
    is not waited for. The first steps, which start threads and fill buffers, do not count.

    Raises:
      SetupError: the data are missing, or a run of this config has too few steps.
    """
    if cfg.total_steps < WARM_UP + steps:
        raise SetupError(
            f"--data takes {WARM_UP + steps} steps, and a run of this config has "
            f"{cfg.total_steps}: give fewer --rounds or --steps, or more config.epochs."
        )
    waited, metrics = 0.0, None
    with contextlib.closing(loader.train_dataset(cfg, mesh)) as batches:
        for step in range(WARM_UP + steps):
            if step == WARM_UP:
                jax.block_until_ready(metrics)
                begin, waited = time.perf_counter(), 0.0
            before = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - before
            previous = metrics
            ours.state, metrics = ours.compiled(ours.state, batch, ours.fixed)
            jax.block_until_ready(previous)
        jax.block_until_ready((ours.state, metrics))
        seconds = time.perf_counter() - begin
    return {
        "step_s": seconds / steps,
        "wait_s": waited / steps,
        "wait_share": waited / seconds,
        "steps": steps,
    }
