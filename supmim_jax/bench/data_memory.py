"""Memory of the processes that feed a host, when they have started and while they read."""

import time

from supmim_jax.bench import data_plan, processes
from supmim_jax.config import Config

SETTLED = 2000  # images of each worker after which memory is first looked at


def started(cfg: Config, plan: data_plan.Plan) -> dict:
    """Seconds to the first batch, and memory once each worker has delivered two."""
    start = time.perf_counter()
    with data_plan.batches(cfg, plan) as stream:
        next(stream)
        first = time.perf_counter() - start
        for _ in range(2 * max(1, plan.workers)):
            next(stream)
        return {"first_batch_s": first, "processes": processes.state()}


def soaked(cfg: Config, plan: data_plan.Plan) -> dict:
    """Memory of every process after min(SETTLED, a quarter) and after all images of a worker."""
    workers = max(1, plan.workers)
    settled = min(SETTLED, plan.soak // 4) * workers // cfg.batch_size
    total = max(settled + 1, plan.soak * workers // cfg.batch_size)
    with data_plan.batches(cfg, plan) as stream:
        for _ in range(settled + 1):
            next(stream)
        begin = processes.state()
        for _ in range(total - settled - 1):
            next(stream)
        end = processes.state()
    growth = {name: end[name]["rss"] - begin[name]["rss"] for name in begin if name in end}
    return {"images": total * cfg.batch_size, "begin": begin, "end": end, "growth_mb": growth}
