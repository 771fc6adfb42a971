"""Batches: a data set opened and checked once, decoded by Grain on each host, put on the mesh.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; `rows` are those of it that this host's devices hold, and nothing else is read.
"""

import math
import queue
import threading
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import grain
import jax
import numpy as np
from absl import flags, logging
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from supmim_jax import sharding
from supmim_jax.batch import Batch
from supmim_jax.config import Config, DataConfig
from supmim_jax.data import sampler, source, transforms, worker
from supmim_jax.data.crops import eval_image, whole_image
from supmim_jax.data.decode import BrokenRecord, decode_image
from supmim_jax.data.token_cache import TokenCache
from supmim_jax.errors import ConfigError, SetupError

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]  # of the examples of a batch, by the fields of Batch

ON_DEVICES = 2  # batches that wait on the devices


@dataclass(frozen=True)
class Dataset:
    """The data of a run: its splits and its token cache, opened and checked.

    Splits are opened when they are first asked for and kept; `open` asks for those that training
    and its evaluations need.
    """

    cfg: Config
    tokens: TokenCache | None = None
    opened: dict[tuple[str, bool], source.Records] = field(default_factory=dict)

    @classmethod
    def open(cls, cfg: Config) -> "Dataset":
        """The data that a run of `cfg` reads; `fractals` are made if need be.

        Raises:
          SetupError: a split or the token cache is missing or is not what the config says.
        """
        dataset = cls(cfg)
        dataset.training_records()
        if not cfg.needs_masks:
            dataset.records(cfg.data.eval_split)
        if cfg.evaluates_masks:
            dataset.records(cfg.data.eval_split, masks=True)
        if not cfg.tokens.cache:
            return dataset
        version = source.version(cfg.data)
        return cls(cfg, TokenCache.open(cfg, version), dataset.opened)

    def records(self, split: str, masks: bool = False) -> source.Records:
        """The encoded records of a split, with "mask" in place of "label" if asked for.

        Raises:
          SetupError: the data set, its split or a field is missing, or not as the config has it.
        """
        if (split, masks) not in self.opened:
            open_records = source.open_masks if masks else source.open_source
            self.opened[split, masks] = open_records(self.cfg.data, split)
        return self.opened[split, masks]

    def class_names(self, split: str = "") -> list[str]:
        """Those of the labels, in order; a class that is only a number is called "class 7"."""
        records = self.records(split or self.cfg.data.train_split)
        names = records.features[self.cfg.data.label_field].names
        return [f"class {name}" if name.isdecimal() else name for name in names]

    def training_records(self) -> source.Records:
        """Those of the training split, with what the objective learns from.

        Raises:
          SetupError: as `records`, or their number is not config.data.train_examples.
        """
        data = self.cfg.data
        records = self.records(data.train_split, self.cfg.needs_masks)
        if len(records) != data.train_examples:
            raise ConfigError(
                f"config.data.train_examples is {data.train_examples}, but {data.name!r} has "
                f"{len(records)} examples in {data.train_split!r}. Set it to that: the number of "
                f"steps follows from it."
            )
        return records

    def train(
        self,
        mesh: Mesh,
        first_step: int = 0,
        broken: int = 0,
        boxes: np.ndarray | None = None,
        skipped: int = 0,
    ) -> "Training":
        """Training batches from `first_step` to the last step, on the mesh.

        Args:
          mesh: what the batches are put on.
          first_step: steps that are done.
          broken: records that were replaced in these, on all processes.
          boxes: what contrastive crops are around, uint8 Nx4 as in crops.py; for
            data.contrastive_crop.boxes = "heat_map" alone. None: there are none yet.
          skipped: batches of the sequence that the run leaves out before `first_step`.

        Raises:
          SetupError: the table of boxes is not of this data set.
        """
        return Training(self, mesh, first_step, broken, boxes, skipped)

    def train_on_host(
        self,
        rows: Sequence[int],
        first_step: int = 0,
        boxes: np.ndarray | None = None,
        skipped: int = 0,
    ) -> "HostBatches":
        """As `train`: the `rows` of each global batch, as arrays of this host."""
        cfg, records = self.cfg, self.training_records()
        if boxes is not None:
            _check_boxes(cfg.data, boxes)
        examples = (
            grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
            .map(sampler.LocalPosition(rows, cfg.batch_size, first_step + skipped))
            .map(sampler.TrainingOrder(len(records), cfg.seed, cfg.data.repeats))
            .map(sampler.Intact(records, self.train_example(boxes)))
        )
        evaluated = cfg.eval.batch_size * len(rows) // cfg.batch_size * _eval_bytes(cfg)
        batches = _decoded(examples, len(rows), cfg.data, evaluated, bool(cfg.eval.every))
        remedy = "another record stands in for it"
        return HostBatches(batches, cfg.data, cfg.data.train_split, remedy)

    def train_example(self, boxes: np.ndarray | None = None) -> Any:
        """What makes an example of a training record, tokens of the cache included."""
        cfg = self.cfg
        if cfg.needs_masks:
            return transforms.MaskedTrainExample(cfg.data, cfg.seed)
        return transforms.TrainExample(
            cfg.data,
            cfg.seed,
            cfg.num_views,
            with_target=cfg.needs_target,
            tokens=self.tokens,
            crops=cfg.objective.crops,
            boxes=boxes,
        )

    def eval(self, split: str, mesh: Mesh) -> Iterator[Batch]:
        """Every example of `split` once, in order; padding at the end has weight 0 and id -1."""
        return self._once(split, mesh, transforms.EvalExample(self.cfg.data))

    def whole(self, split: str, mesh: Mesh) -> Iterator[Batch]:
        """`eval` with the whole images, resized to squares, so that a box means all of them."""
        return self._once(split, mesh, transforms.EvalExample(self.cfg.data, whole_image))

    def masked(self, split: str, mesh: Mesh) -> Iterator[Batch]:
        """`eval` with masks in place of labels, cropped as the images are."""
        return self._once(split, mesh, transforms.MaskedExample(self.cfg.data), masks=True)

    def _once(self, split: str, mesh: Mesh, make, masks: bool = False) -> Iterator[Batch]:
        size = self.cfg.eval.batch_size
        host = self.once_on_host(split, local_rows(size, mesh), make, masks)
        return _on_mesh(host, size, mesh)

    def once_on_host(
        self, split: str, rows: Sequence[int], make, masks: bool = False
    ) -> "HostBatches":
        """Every example of `split` once: the `rows` of each global batch, as `make` makes them."""
        cfg, records = self.cfg, self.records(split, masks)
        examples = (
            grain.MapDataset.range(len(rows) * math.ceil(len(records) / cfg.eval.batch_size))
            .map(sampler.LocalPosition(rows, cfg.eval.batch_size))
            .map(sampler.EvaluationRecord(records))
            .map(make)
        )
        remedy = "it counts as a grey image, if its label can be read"
        return HostBatches(_decoded(examples, len(rows), cfg.data), cfg.data, split, remedy)

    def target_images(
        self, first: int, stop: int, batch_size: int
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Images of records [first, stop) of a token cache, and the marks of their files.

        In batches, uint8 BxHxWxC and uint32 B. Record v * examples + i is view v of example i; the
        last batch may be smaller.
        """
        records = self.training_records()
        examples = (
            grain.MapDataset.range(first, stop)
            .map(sampler.ViewOrder(len(records)))
            .map(sampler.Intact(records, transforms.TargetExample(self.train_example())))
        )
        for arrays in _decoded(examples, batch_size, self.cfg.data, drop=False):
            yield arrays["image"], arrays["mark"]

    def first_images(self, count: int) -> np.ndarray:
        """The first `count` training images that are whole, as evaluation sees them: NxHxWxC.

        Returns:
          uint8, fewer images where there are fewer.

        Raises:
          SetupError: there is none.
        """
        data, records, images = self.cfg.data, self.training_records(), []
        for i in range(len(records)):
            try:
                images.append(eval_image(decode_image(records[i], data, i), data))
            except BrokenRecord:
                continue
            if len(images) == count:
                break
        if not images:
            raise SetupError(f"No image of {data.name!r}, {data.train_split}, can be decoded.")
        return np.stack(images)


class Training(Iterator[Batch]):
    """The batches of a run, and how many of its records were broken."""

    def __init__(
        self,
        dataset: Dataset,
        mesh: Mesh,
        first_step: int,
        before: int,
        boxes: np.ndarray | None,
        skipped: int,
    ):
        self.dataset, self.mesh, self.before, self.skipped = dataset, mesh, before, skipped
        self.here = 0  # broken records of this process, in the batches that were taken
        self.logged: set[int] = set()  # ids of those that were logged
        self._open(first_step, boxes)

    def _open(self, first_step: int, boxes: np.ndarray | None) -> None:
        size, before = self.dataset.cfg.batch_size, self.here
        rows = local_rows(size, self.mesh)
        self.host = host = self.dataset.train_on_host(rows, first_step, boxes, self.skipped)
        host.logged = self.logged
        batches = _on_mesh(host, size, self.mesh)
        self.batches = Prefetch(((batch, before + host.broken) for batch in batches), ON_DEVICES)

    def restart(self, step: int, boxes: np.ndarray | None) -> None:
        """Goes on after `step` steps with other boxes, as `Dataset.train` would from there.

        Batches that were made ahead are dropped, and broken records in them do not count.

        Raises:
          SetupError: as `Dataset.train`; there are no more batches then.
        """
        self.close()
        self._open(step, boxes)

    def close(self) -> None:
        """Ends the threads or processes that decode and place."""
        self.batches.close()
        self.host.close()

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
        broken, data = self.before + here, self.dataset.cfg.data
        read = step * self.dataset.cfg.batch_size
        if broken > data.max_broken * max(read, data.train_examples):
            raise SetupError(
                f"{broken} of {read} records of {data.name!r} that were read were broken, more "
                f"than config.data.max_broken = {data.max_broken:g} allows. The log on stderr "
                f"names each: remove the data set's directory and prepare it again, or allow more."
            )
        return broken


class HostBatches(Iterator[Arrays]):
    """Batches of one host, and how many of their records were broken; each is logged once."""

    def __init__(self, batches: grain.DatasetIterator, data: DataConfig, split: str, remedy: str):
        self.batches, self.remedy = batches, remedy
        self.where = f"{data.name}, split {split},"
        self.broken, self.logged = 0, set()

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
            if example not in self.logged:
                self.logged.add(example)
                logging.error("Record %d of %s is broken; %s.", example, self.where, self.remedy)
        return arrays


class Prefetch(Iterator[Item], Generic[Item]):
    """`items`, of which a thread keeps up to `most` ready; an exception comes at its item's place.

    Not Grain's own prefetching: that is for Grain's data sets, whose iterators have a state to
    save, and these items are on devices.
    """

    def __init__(self, items: Iterator[Item], most: int):
        self.ready, self.closed = queue.Queue(most), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(
            target=_fill, args=(items, self.ready, self.closed), name="prefetch", daemon=True
        )
        # A consumer that is dropped without `close` must not leave the thread waiting for room.
        weakref.finalize(self, _end, self.ready, self.closed)
        self.thread.start()

    def __next__(self) -> Item:
        if self.error is None:
            item, self.error = self.ready.get()
            if self.error is None:
                return item
        raise self.error

    def close(self) -> None:
        """Ends the thread; an item that it has begun is made and dropped. May be repeated."""
        self.error = self.error or StopIteration()
        _end(self.ready, self.closed)
        self.thread.join()


def _fill(items: Iterator[Item], ready: queue.Queue, closed: threading.Event) -> None:
    error = None
    while error is None and not closed.is_set():
        item = None  # or the last one would be kept while the next is made
        try:
            item = next(items)
        except BaseException as raised:  # StopIteration too
            error = raised
        ready.put((item, error))


def _end(ready: queue.Queue, closed: threading.Event) -> None:
    closed.set()
    while not ready.empty():  # a thread that waits for room goes on
        ready.get()


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, in order."""
    layout = NamedSharding(mesh, sharding.BATCH)
    indices = layout.addressable_devices_indices_map((batch_size,))
    spans = {span.indices(batch_size)[:2] for (span,) in indices.values()}
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _check_boxes(data: DataConfig, boxes: np.ndarray) -> None:
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


def _eval_bytes(cfg: Config) -> int:
    """Of an image that an evaluation reads, and of its mask where it reads one."""
    return cfg.data.image_size**2 * (cfg.data.channels + 4 * cfg.evaluates_masks)


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


def _on_mesh(batches: Iterator[Arrays], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's rows as its part of each global batch."""
    layout = NamedSharding(mesh, sharding.BATCH)
    place = {row: i for i, row in enumerate(local_rows(batch_size, mesh))}

    def put(x: np.ndarray) -> jax.Array:
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[place[start] : place[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), layout, shard)

    for arrays in batches:
        fields = {name: put(x) for name, x in arrays.items()}
        views = [fields.pop(name) for name in ("image", "second_image") if name in fields]
        yield Batch(tuple(views), **fields)
