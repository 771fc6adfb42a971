"""Global batches on the mesh, made by Grain from the records of a tfds data set.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; each process decodes only the rows that its own devices hold.
"""

import math
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax.config import Config
from supmim_jax.data import records, transforms
from supmim_jax.types import Batch

ROWS = PartitionSpec(("data", "fsdp"))  # the mesh axes that share a batch


def check(cfg: Config) -> None:
    """Opens both splits, making `fractals` if need be, before anything else is written.

    Raises:
      SetupError: a split is missing or is not what the config says.
    """
    records.open_training_source(cfg.data)
    records.open_source(cfg.data, cfg.data.eval_split)


def train_dataset(cfg: Config, mesh: Mesh, first_step: int = 0) -> Iterator[Batch]:
    """Training batches from `first_step` to the last step.

    Raises:
      SetupError: the data set is missing or is not what the config says.
    """
    source = records.open_training_source(cfg.data)
    rows = local_rows(cfg.batch_size, mesh)
    examples = (
        grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
        .map(records.LocalPosition(rows, cfg.batch_size, first_step))
        .map(records.TrainingRecord(source, cfg.seed))
        .map(transforms.TrainExample(cfg.data, cfg.seed))
    )
    return _batches(examples, cfg, cfg.batch_size, rows, mesh)


def eval_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
    source = records.open_source(cfg.data, split)
    rows = local_rows(cfg.eval.batch_size, mesh)
    steps = math.ceil(len(source) / cfg.eval.batch_size)
    examples = (
        grain.MapDataset.range(len(rows) * steps)
        .map(records.LocalPosition(rows, cfg.eval.batch_size))
        .map(records.EvaluationRecord(source))
        .map(transforms.EvalExample(cfg.data))
    )
    return _batches(examples, cfg, cfg.eval.batch_size, rows, mesh)


def first_images(cfg: Config, count: int) -> np.ndarray:
    """The first `count` training images as evaluation sees them: uint8 NxHxWxC."""
    source = records.open_training_source(cfg.data)
    make = transforms.EvalExample(cfg.data)
    return np.stack([make((i, source[i]))["image"] for i in range(min(count, len(source)))])


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, in order."""
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    spans = {span.indices(batch_size)[:2] for (span,) in indices.values()}
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _batches(examples, cfg: Config, batch_size: int, rows, mesh: Mesh) -> Iterator[Batch]:
    """Batches decoded ahead, each by one thread or process, and put on the mesh."""
    threads, ahead = cfg.data.threads, max(cfg.data.prefetch, cfg.data.threads)
    options = grain.ReadOptions(1, 1) if cfg.data.workers else grain.ReadOptions(threads, ahead)
    local = examples.batch(len(rows), drop_remainder=True).to_iter_dataset(options)
    if cfg.data.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        local = local.mp_prefetch(grain.MultiprocessingOptions(num_workers=cfg.data.workers))
    for arrays in local:
        yield _global_batch(arrays, batch_size, rows, mesh)


def _global_batch(arrays: dict, batch_size: int, rows: tuple[int, ...], mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch."""
    sharding = NamedSharding(mesh, ROWS)
    place = {row: i for i, row in enumerate(rows)}

    def put(x: np.ndarray) -> jax.Array:
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[place[start] : place[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    return Batch(
        (put(arrays["image"]),), put(arrays["label"]), put(arrays["weight"]), put(arrays["id"])
    )
