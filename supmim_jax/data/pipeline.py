"""Global batches on the mesh, made by Grain from the records of a tfds data set.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; each process decodes only the rows that its own devices hold.
"""

import dataclasses
import math
from collections.abc import Iterator

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax.config import Config, SetupError, TokensConfig
from supmim_jax.data import records, sequence, token_cache, transforms, worker
from supmim_jax.types import Batch

ROWS = PartitionSpec(("data", "fsdp"))  # the mesh axes that share a batch


def check(cfg: Config) -> None:
    """Opens both splits, making `fractals` if need be, before anything else is written.

    Raises:
      SetupError: a split or the token cache is missing or is not what the config says.
    """
    records.open_training_source(cfg.data, cfg.needs_masks)
    if not cfg.needs_masks:
        records.open_source(cfg.data, cfg.data.eval_split)
    if {"segmentation", "miou"} & set(cfg.eval.which):
        records.open_masks(cfg.data, cfg.data.eval_split)
    if cfg.tokens.cache:
        token_cache.open_cache(cfg)


def train_dataset(cfg: Config, mesh: Mesh, first_step: int = 0, broken: int = 0) -> "Training":
    """Training batches from `first_step` to the last step.

    Args:
      cfg: the experiment.
      mesh: what the batches are put on.
      first_step: steps that are done.
      broken: records that were replaced in these, on all processes.

    Raises:
      SetupError: the data set is missing or is not what the config says.
    """
    source = records.open_training_source(cfg.data, cfg.needs_masks)
    rows = local_rows(cfg.batch_size, mesh)
    examples = (
        grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
        .map(sequence.LocalPosition(rows, cfg.batch_size, first_step))
        .map(sequence.TrainingOrder(len(source), cfg.seed))
        .map(sequence.Intact(source, train_example(cfg)))
    )
    tally = BrokenRecords(cfg.data.name, cfg.data.train_split, "another record stands in for it")
    batches = _batches(examples, cfg, cfg.batch_size, rows, mesh, tally)
    return Training(batches, cfg, tally, broken)


class Training(Iterator[Batch]):
    """The batches of a run, and how many of its records were broken."""

    def __init__(self, batches: Iterator[Batch], cfg: Config, tally: "BrokenRecords", before: int):
        self.batches, self.cfg, self.tally, self.before = batches, cfg, tally, before

    def __next__(self) -> Batch:
        return next(self.batches)

    def broken(self, step: int) -> int:
        """Records that were replaced up to this step, on all processes; all must call this.

        Raises:
          SetupError: they are more than config.data.max_broken allows.
        """
        found = self.before + self.tally.total()
        read = max(step * self.cfg.batch_size, self.cfg.data.train_examples)
        if found > self.cfg.data.max_broken * read:
            raise SetupError(
                f"{found} of {step * self.cfg.batch_size} records of {self.cfg.data.name!r} "
                f"were broken, more than config.data.max_broken = {self.cfg.data.max_broken:g} "
                f"allows. Their ids are in the log: prepare the data set again, or allow more."
            )
        return found


class BrokenRecords:
    """Counts the broken records of this process, and logs each id once."""

    def __init__(self, name: str, split: str, remedy: str):
        self.name, self.split, self.remedy = name, split, remedy
        self.count, self.known = 0, set()

    def add(self, ids: np.ndarray) -> None:
        """Ids of broken records, or NONE."""
        for example in ids[ids != sequence.NONE].tolist():
            self.count += 1
            if example not in self.known:
                self.known.add(example)
                logging.error(
                    "Record %d of %s, split %s, is broken; %s.",
                    *(example, self.name, self.split, self.remedy),
                )

    def total(self) -> int:
        """The count of all processes, each of which must call this."""
        if jax.process_count() == 1:
            return self.count
        return int(multihost_utils.process_allgather(np.int32(self.count)).sum())


def train_example(cfg: Config) -> transforms.TrainExample | transforms.MaskedTrainExample:
    """What makes an example of a training record, tokens of the cache included."""
    if cfg.needs_masks:
        return transforms.MaskedTrainExample(cfg.data, cfg.seed)
    cache = token_cache.open_cache(cfg) if cfg.tokens.cache else None
    return transforms.TrainExample(cfg.data, cfg.seed, cfg.num_views, cfg.needs_target, cache)


def target_images(cfg: Config, first: int, stop: int, batch_size: int) -> Iterator[np.ndarray]:
    """The images of records [first, stop) of a token cache, uint8 BxHxWxC in batches.

    Record v * examples + i is view v of example i; the last batch may be smaller.
    """
    source = records.open_training_source(cfg.data)
    make = train_example(dataclasses.replace(cfg, tokens=TokensConfig()))
    examples = (
        grain.MapDataset.range(first, stop)
        .map(sequence.ViewOrder(len(source)))
        .map(sequence.Intact(source, transforms.TargetExample(make)))
    )
    for arrays in _decoded(examples.batch(batch_size), cfg):
        yield arrays["image"]


def eval_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
    source = records.open_source(cfg.data, split)
    return _evaluation(source, split, transforms.EvalExample(cfg.data), cfg, mesh)


def masked_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """`eval_dataset` with masks in place of labels, cropped as the images are."""
    source = records.open_masks(cfg.data, split)
    return _evaluation(source, split, transforms.MaskedExample(cfg.data), cfg, mesh)


def _evaluation(source, split: str, transform, cfg: Config, mesh: Mesh) -> Iterator[Batch]:
    rows = local_rows(cfg.eval.batch_size, mesh)
    steps = math.ceil(len(source) / cfg.eval.batch_size)
    examples = (
        grain.MapDataset.range(len(rows) * steps)
        .map(sequence.LocalPosition(rows, cfg.eval.batch_size))
        .map(sequence.EvaluationRecord(source))
        .map(transform)
    )
    tally = BrokenRecords(cfg.data.name, split, "a grey image stands for it")
    return _batches(examples, cfg, cfg.eval.batch_size, rows, mesh, tally)


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


def _batches(
    examples, cfg: Config, batch_size: int, rows, mesh: Mesh, tally: BrokenRecords
) -> Iterator[Batch]:
    """Global batches, put on the mesh."""
    for arrays in _decoded(examples.batch(len(rows), drop_remainder=True), cfg):
        tally.add(arrays.pop("broken"))
        yield _global_batch(arrays, batch_size, rows, mesh)


def _decoded(batches, cfg: Config) -> Iterator[dict]:
    """Batches decoded ahead, each by one thread or process."""
    threads, ahead = cfg.data.threads, max(cfg.data.prefetch, cfg.data.threads)
    options = grain.ReadOptions(1, 1) if cfg.data.workers else grain.ReadOptions(threads, ahead)
    local = batches.to_iter_dataset(options)
    if cfg.data.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        worker.keep_light()
        local = local.mp_prefetch(grain.MultiprocessingOptions(num_workers=cfg.data.workers))
    return iter(local)


def _global_batch(arrays: dict, batch_size: int, rows: tuple[int, ...], mesh: Mesh) -> Batch:
    """This process's rows as its part of the global batch."""
    sharding = NamedSharding(mesh, ROWS)
    place = {row: i for i, row in enumerate(rows)}

    def put(x: np.ndarray) -> jax.Array:
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[place[start] : place[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    found = {name: put(x) for name, x in arrays.items()}
    return Batch((found.pop("image"),), **found)
