"""Images per second and per core: ours and tf.data by turns."""

import contextlib
import time
from collections.abc import Callable
from importlib import metadata

import jax
import numpy as np

from rivals import data_plan, photographs, processes, tfdata_reference
from supmim_jax.config import Config
from supmim_jax.data import crops, transforms
from supmim_jax.data import source as source_module
from supmim_jax.errors import SetupError

OURS = "supmim_jax"
HALVES_DIFFER = 4.0  # of 255, in the mean: what aliasing and truncation may make


def compared(source: source_module.Records, cfg: Config, plan: data_plan.Plan) -> dict:
    """Ours and tf.data on one core by turns, then whole pipelines on several, one after the other.

    Both make the same crops of the same records, as many as fill whole batches.
    """
    batches = len(source) // cfg.batch_size
    transformed(source, cfg, batches)  # opens files, fills caches
    if not plan.rival or plan.augment != "none":
        own = [transformed(source, cfg, batches) for _ in range(plan.rounds)]
        host = summed({OURS: windows(cfg, plan)})
        return {"one_core": summed({OURS: own}), "host": host}
    if metadata_version("tensorflow") is None:
        raise SetupError("TensorFlow is not installed, so nothing to compare with: --norival.")
    cores = max(1, plan.workers or plan.threads)
    rows = boxes(cfg, batches * cfg.batch_size)
    given = ([source.raw[i] for i in range(len(rows))], rows, data_plan.SIZE, cfg.batch_size)
    with tfdata_reference.Rival(*given, cores=1) as rival:
        version = rival.version
        one = turns(lambda: transformed(source, cfg, batches), rival, batches, plan.rounds)
    check_same(one)
    name, share = "tf.data", plan.share
    with tfdata_reference.Rival(*given, cores=cores) as rival:
        host = {OURS: windows(cfg, plan)}
        rival.measure(name, 4 * cores)  # until its buffers are as full as they will be
        host[name] = [rival.measure(name, share) for _ in range(plan.rounds)]
    return {"one_core": summed(one), "host": summed(host), "tensorflow": version, "cores": cores}


def metadata_version(package: str) -> str | None:
    """The version of any build of a package, None where there is none."""
    for name in (package, f"{package}-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def turns(ours: Callable, rival, batches: int, rounds: int) -> dict[str, list[dict]]:
    """`rounds` measurements of each, ours before each of theirs, all within one stretch of time."""
    names = list(tfdata_reference.VARIANTS)
    found = {name: [] for name in [OURS, *names]}
    for name in names:
        rival.measure(name, batches)  # builds the graph's functions
    for _ in range(rounds):
        found[OURS].append(ours())
        for name in names:
            found[name].append(rival.measure(name, batches))
    return found


def check_same(found: dict[str, list[dict]]) -> None:
    """Whether the images of the last batch are the same, as far as means of their halves tell.

    Raises:
      RuntimeError: they are not, so that the times are of different work.
    """
    ours = np.array(found[OURS][0]["halves"])
    for name, rounds in found.items():
        apart = np.abs(np.array(rounds[0]["halves"]) - ours).mean()
        if apart > HALVES_DIFFER:
            raise RuntimeError(f"The images of {name} differ from ours by {apart:.1f} of 255.")


def summed(found: dict[str, list[dict]]) -> dict[str, dict]:
    """Seconds per 1000 images, images per second, and ours over theirs: median, least and most.

    Each round's ratio is of CPU seconds, theirs over ours in the same round, so that other
    processes' noise cancels; above 1 ours is faster.
    """
    ours, result = found[OURS], {}
    for name, rounds in found.items():
        cpu, wall = (
            float(np.median([1000 * r[clock] / r["images"] for r in rounds]))
            for clock in ("cpu", "wall")
        )
        ratio = [(b["cpu"] / b["images"]) / (a["cpu"] / a["images"]) for a, b in zip(ours, rounds)]
        result[name] = {
            "cpu_s_per_1000": cpu, "wall_s_per_1000": wall,
            "images_per_cpu_s": 1000 / cpu, "images_per_s": 1000 / wall,
            "ratio": float(np.median(ratio)), "ratio_min": min(ratio), "ratio_max": max(ratio),
        }  # fmt: skip
    return result


def transformed(source: source_module.Records, cfg: Config, batches: int) -> dict[str, float]:
    """Seconds of the first records through the transforms, stacked in batches: one thread."""
    example = transforms.TrainExample(cfg.data, cfg.seed, 1)
    wall, cpu = time.perf_counter(), tfdata_reference.cpu_seconds()
    for first in range(0, batches * cfg.batch_size, cfg.batch_size):
        made = [example((0, i, source[i])) for i in range(first, first + cfg.batch_size)]
        arrays = {name: np.stack([x[name] for x in made]) for name in made[0]}
    wall, cpu = time.perf_counter() - wall, tfdata_reference.cpu_seconds() - cpu
    halves = tfdata_reference.halves(arrays["image"])
    return {"wall": wall, "cpu": cpu, "images": batches * cfg.batch_size, "halves": halves}


def boxes(cfg: Config, count: int) -> np.ndarray:
    """int32 count x 5: the crop that `transformed` takes of each record, and if it is mirrored."""
    rows = []
    for i in range(count):
        rng = transforms.generator(cfg.seed, 0, i, transforms.GEOMETRY)
        crop = crops.draw_crop(photographs.HEIGHT, photographs.WIDTH, cfg.data, rng)
        rows.append((*crop.box, crop.mirrored))
    return np.array(rows, np.int32)


def windows(cfg: Config, plan: data_plan.Plan) -> list[dict]:
    """`rounds` windows of the whole pipeline after a warm-up: seconds of wall clock and of CPU.

    Whoever takes the batches does nothing else, so wall clock is all waiting for the next one. CPU
    is that of this process and of its workers.
    """
    found = []
    with data_plan.batches(cfg, plan) as stream:
        for _ in range(4 * max(1, plan.workers)):  # each worker has its buffers full, as later
            next(stream)
        pids = processes.workers()

        def spent() -> float:
            return tfdata_reference.cpu_seconds() + sum(map(processes.cpu_seconds, pids))

        for _ in range(plan.rounds):
            wall, cpu = time.perf_counter(), spent()
            for _ in range(plan.share):
                jax.block_until_ready(next(stream).views)
            cpu = spent() - cpu
            wall = time.perf_counter() - wall
            found.append({"wall": wall, "cpu": cpu, "images": plan.share * cfg.batch_size})
    return found
