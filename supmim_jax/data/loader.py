"""Global batches on the mesh, of what each host feeds (feed.py).

The next items are made by a thread while one is used.

What one host feeds its devices: decoded examples in batches, made by Grain. Knows no JAX.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; `rows` are those of it that this host's devices hold, and nothing else is read."""

import dataclasses
import math
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax.batch import Batch
from supmim_jax.config import Config, DataConfig, TokensConfig
from supmim_jax.data import sampler, token_cache, transforms, worker
from supmim_jax.data import source as source_module
from supmim_jax.data.crops import eval_image, whole_image
from supmim_jax.data.decode import BrokenRecord, decode_image
from supmim_jax.errors import SetupError

Item = TypeVar("Item")


class Ahead(Iterator[Item], Generic[Item]):
    """`items`, of which up to `most` wait made; an exception comes at its item's place.

    Taking an item that is ready does not block, so the thread gets no turn at that moment; it makes
    the next item as soon as the consumer gives up Python's lock.
    """

    def __init__(self, items: Iterator[Item], most: int):
        self.made, self.closed = queue.Queue(most), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(
            target=_make, args=(items, self.made, self.closed), name="ahead", daemon=True
        )
        weakref.finalize(self, _end, self.made, self.closed)
        self.thread.start()

    def __next__(self) -> Item:
        if self.error is None:
            item, self.error = self.made.get()
            if self.error is None:
                return item
        raise self.error

    def close(self) -> None:
        """Ends the thread; an item that it has begun is made and dropped. May be repeated."""
        self.error = self.error or StopIteration()
        _end(self.made, self.closed)
        self.thread.join()


def _make(items: Iterator[Item], made: queue.Queue, closed: threading.Event) -> None:
    error = None
    while error is None and not closed.is_set():
        item = None  # or the last one would be kept while the next is made
        try:
            item = next(items)
        except BaseException as found:  # StopIteration too
            error = found
        made.put((item, error))


def _end(made: queue.Queue, closed: threading.Event) -> None:
    closed.set()
    while not made.empty():  # a thread that waits for room goes on
        made.get()


Arrays = dict[str, np.ndarray]  # of the examples of a batch, by the fields of types.Batch


def check(cfg: Config) -> None:
    """Opens both splits, making `fractals` if need be, before anything else is written.

    Raises:
      SetupError: a split or the token cache is missing or is not what the config says.
    """
    source_module.open_training_source(cfg.data, cfg.needs_masks)
    if not cfg.needs_masks:
        source_module.open_source(cfg.data, cfg.data.eval_split)
    if {"segmentation", "miou"} & set(cfg.eval.which):
        source_module.open_masks(cfg.data, cfg.data.eval_split)
    if cfg.tokens.cache:
        token_cache.open_cache(cfg)


class Feed(Iterator[Arrays]):
    """Batches of one host, and how many of their records were broken; each is logged once."""

    def __init__(self, batches: grain.DatasetIterator, data: DataConfig, split: str, remedy: str):
        self.batches, self.remedy = batches, remedy
        self.where = f"{data.name}, split {split},"
        self.broken, self.known = 0, set()

    def close(self) -> None:
        """Ends the threads or processes that decode."""
        self.batches.close()

    def __next__(self) -> Arrays:
        try:
            arrays = next(self.batches)
        except RuntimeError as error:
            raise worker.ended(error) from None
        ids = arrays.pop("broken")
        for example in ids[ids != sampler.NONE].tolist():
            self.broken += 1
            if example not in self.known:
                self.known.add(example)
                logging.error("Record %d of %s is broken; %s.", example, self.where, self.remedy)
        return arrays


def training(
    cfg: Config,
    rows: Sequence[int],
    first_step: int = 0,
    boxes: np.ndarray | None = None,
    skipped: int = 0,
) -> Feed:
    """Training batches from `first_step` to the last step.

    Args:
      cfg: the experiment.
      rows: of the global batch that are fed here.
      first_step: steps that are done.
      boxes: what contrastive crops are around, a table as in contrastive_crop.py; for
        data.contrastive_crop.boxes = "heat_map" alone. None: there are none yet.
      skipped: batches of the sequence that are left out before `first_step`.

    Raises:
      SetupError: the data set is missing or is not what the config says, or the table is not.
    """
    if boxes is not None:
        check_boxes(cfg.data, boxes)
    source = source_module.open_training_source(cfg.data, cfg.needs_masks)
    examples = (
        grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
        .map(sampler.LocalPosition(rows, cfg.batch_size, first_step + skipped))
        .map(sampler.TrainingOrder(len(source), cfg.seed, cfg.data.repeats))
        .map(sampler.Intact(source, train_example(cfg, boxes)))
    )
    evaluated = cfg.eval.batch_size * len(rows) // cfg.batch_size * _eval_bytes(cfg)
    batches = _decoded(examples, len(rows), cfg.data, evaluated, bool(cfg.eval.every))
    return Feed(batches, cfg.data, cfg.data.train_split, "another record stands in for it")


def check_boxes(data: DataConfig, boxes: np.ndarray) -> None:
    """Raises SetupError unless crops follow such a table, a row for each training record."""
    if not data.learns_boxes:
        raise SetupError(
            f"A table of boxes was given, but config.data.crop is {data.crop!r} and "
            f"config.data.contrastive_crop.boxes is {data.contrastive_crop.boxes!r}: only crop "
            f"'contrastive' with boxes 'heat_map' follows one. Give none, or set both."
        )
    if boxes.dtype != np.uint8 or boxes.shape != (data.train_examples, 4):
        raise SetupError(
            f"The table of boxes is {boxes.dtype} of shape {boxes.shape}, but "
            f"config.data.train_examples = {data.train_examples} needs uint8 of shape "
            f"({data.train_examples}, 4). Find the boxes of this data set."
        )


def evaluation(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
    source = source_module.open_source(cfg.data, split)
    return _once(source, transforms.EvalExample(cfg.data), cfg, split, rows)


def whole(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """`evaluation` with the whole images, resized to squares, so that a box means all of them."""
    source = source_module.open_source(cfg.data, split)
    return _once(source, transforms.EvalExample(cfg.data, whole_image), cfg, split, rows)


def masked(cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    """`evaluation` with masks in place of labels, cropped as the images are."""
    source = source_module.open_masks(cfg.data, split)
    return _once(source, transforms.MaskedExample(cfg.data), cfg, split, rows)


def _once(source, make, cfg: Config, split: str, rows: Sequence[int]) -> Feed:
    steps = math.ceil(len(source) / cfg.eval.batch_size)
    examples = (
        grain.MapDataset.range(len(rows) * steps)
        .map(sampler.LocalPosition(rows, cfg.eval.batch_size))
        .map(sampler.EvaluationRecord(source))
        .map(make)
    )
    batches = _decoded(examples, len(rows), cfg.data)
    return Feed(batches, cfg.data, split, "it counts as a grey image, if its label can be read")


def target_images(
    cfg: Config, first: int, stop: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Images of records [first, stop) of a token cache, and the marks of their files, in batches.

    These are uint8 BxHxWxC and uint32 B. Record v * examples + i is view v of example i; the last
    batch may be smaller.
    """
    source = source_module.open_training_source(cfg.data)
    make = train_example(dataclasses.replace(cfg, tokens=TokensConfig()))
    examples = (
        grain.MapDataset.range(first, stop)
        .map(sampler.ViewOrder(len(source)))
        .map(sampler.Intact(source, transforms.TargetExample(make)))
    )
    for arrays in _decoded(examples, batch_size, cfg.data, drop=False):
        yield arrays["image"], arrays["mark"]


def train_example(cfg: Config, boxes: np.ndarray | None = None) -> Any:
    """What makes an example of a training record, tokens of the cache included."""
    if cfg.needs_masks:
        return transforms.MaskedTrainExample(cfg.data, cfg.seed)
    cache = token_cache.open_cache(cfg) if cfg.tokens.cache else None
    return transforms.TrainExample(
        cfg.data,
        cfg.seed,
        cfg.num_views,
        with_target=cfg.needs_target,
        tokens=cache,
        crops=cfg.crops_per_example,
        boxes=boxes,
    )


def first_images(cfg: Config, count: int) -> np.ndarray:
    """The first `count` training images that are whole, as evaluation sees them: uint8 NxHxWxC.

    Raises:
      SetupError: there is none.
    """
    source, images = source_module.open_training_source(cfg.data), []
    for i in range(len(source)):
        try:
            images.append(eval_image(decode_image(source[i], cfg.data, i), cfg.data))
        except BrokenRecord:
            continue
        if len(images) == count:
            break
    if not images:
        raise SetupError(f"No image of {cfg.data.name!r}, {cfg.data.train_split}, can be decoded.")
    return np.stack(images)


def _eval_bytes(cfg: Config) -> int:
    """Of an image that an evaluation reads, and of its mask where it reads one."""
    masks = 4 * bool({"segmentation", "miou"} & set(cfg.eval.which))
    return cfg.data.image_size**2 * (cfg.data.channels + masks)


def _decoded(
    examples: grain.MapDataset,
    size: int,
    data: DataConfig,
    later: int = 0,
    beside: bool = False,
    drop: bool = True,
) -> grain.DatasetIterator:
    """Batches decoded ahead, each by one thread or process.

    Args:
      examples: of which `size` are a batch.
      size: as above.
      data: the config's section.
      later: bytes of a batch that workers are asked for later on, so that it is known now.
      beside: whether that is while these workers wait.
      drop: whether a last batch that is smaller is left out.

    Raises:
      SetupError: the workers' shared memory is too small.
    """
    batches = examples.batch(size, drop_remainder=drop)
    threads, ahead = data.threads, max(data.prefetch, data.threads)
    options = grain.ReadOptions(1, 1) if data.workers else grain.ReadOptions(threads, ahead)
    local = batches.to_iter_dataset(options)
    if data.workers:
        first = examples[0] if len(examples) else {}
        arrays = (size * np.asarray(x).nbytes for x in first.values())
        now = sum(math.ceil(x / worker.PAGE) * worker.PAGE for x in arrays)
        worker.check_room(data.workers, now + later if beside else max(now, later))
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        worker.keep_light()
        local = local.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    return iter(local)


AHEAD = 2  # batches that wait on the devices
ROWS = PartitionSpec(("data", "fsdp"))  # the mesh axes that share a batch


def train_dataset(
    cfg: Config,
    mesh: Mesh,
    first_step: int = 0,
    broken: int = 0,
    boxes: np.ndarray | None = None,
    skipped: int = 0,
) -> "Training":
    """Training batches from `first_step` to the last step.

    Args:
      cfg: the experiment.
      mesh: what the batches are put on.
      first_step: steps that are done.
      broken: records that were replaced in these, on all processes.
      boxes: what contrastive crops are around; see feed.training.
      skipped: batches of the sequence that the run leaves out before `first_step`.

    Raises:
      SetupError: the data set is missing or is not what the config says, or the table is not.
    """
    return Training(cfg, mesh, first_step, broken, boxes, skipped)


class Training(Iterator[Batch]):
    """The batches of a run, and how many of its records were broken."""

    def __init__(
        self,
        cfg: Config,
        mesh: Mesh,
        first_step: int,
        before: int,
        boxes: np.ndarray | None,
        skipped: int,
    ):
        self.cfg, self.mesh, self.before, self.skipped = cfg, mesh, before, skipped
        self.here = 0  # broken records of this process, in the batches that were taken
        self.known: set[int] = set()  # ids of those that were logged
        self._open(first_step, boxes)

    def _open(self, first_step: int, boxes: np.ndarray | None) -> None:
        cfg, taken = self.cfg, self.here
        rows = local_rows(cfg.batch_size, self.mesh)
        self.feed = fed = training(cfg, rows, first_step, boxes, self.skipped)
        fed.known = self.known
        batches = _on_mesh(fed, cfg.batch_size, self.mesh)
        self.batches = Ahead(((batch, taken + fed.broken) for batch in batches), AHEAD)

    def restart(self, step: int, boxes: np.ndarray | None) -> None:
        """Goes on after `step` steps with other boxes, as `train_dataset` would from there.

        Batches that were made ahead are dropped, and broken records in them do not count.

        Raises:
          SetupError: as train_dataset; there are no more batches then.
        """
        self.close()
        self._open(step, boxes)

    def close(self) -> None:
        """Ends the threads or processes that decode and place."""
        self.batches.close()
        self.feed.close()

    def __next__(self) -> Batch:
        batch, self.here = next(self.batches)
        return batch

    def broken(self, step: int) -> int:
        """Records that were replaced up to this step, on all processes, each of which must call.

        Raises:
          SetupError: they are more than config.data.max_broken allows.
        """
        here = self.here
        if jax.process_count() > 1:
            here = int(multihost_utils.process_allgather(np.int32(here)).sum())
        found, data = self.before + here, self.cfg.data
        read = step * self.cfg.batch_size
        if found > data.max_broken * max(read, data.train_examples):
            raise SetupError(
                f"{found} of {read} records of {data.name!r} that were read were broken, more "
                f"than config.data.max_broken = {data.max_broken:g} allows. The log on stderr "
                f"names each: remove the data set's directory and prepare it again, or allow more."
            )
        return found


def eval_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
    rows = local_rows(cfg.eval.batch_size, mesh)
    return _on_mesh(evaluation(cfg, split, rows), cfg.eval.batch_size, mesh)


def whole_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """`eval_dataset` with the whole images, resized to squares: for boxes in them."""
    rows = local_rows(cfg.eval.batch_size, mesh)
    return _on_mesh(whole(cfg, split, rows), cfg.eval.batch_size, mesh)


def masked_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """`eval_dataset` with masks in place of labels, cropped as the images are."""
    rows = local_rows(cfg.eval.batch_size, mesh)
    return _on_mesh(masked(cfg, split, rows), cfg.eval.batch_size, mesh)


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, in order."""
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    spans = {span.indices(batch_size)[:2] for (span,) in indices.values()}
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _on_mesh(batches: Iterator[Arrays], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's rows as its part of each global batch."""
    sharding = NamedSharding(mesh, ROWS)
    place = {row: i for i, row in enumerate(local_rows(batch_size, mesh))}

    def put(x: np.ndarray) -> jax.Array:
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[place[start] : place[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, shard)

    for arrays in batches:
        found = {name: put(x) for name, x in arrays.items()}
        views = [found.pop(name) for name in ("image", "second_image") if name in found]
        yield Batch(tuple(views), **found)
