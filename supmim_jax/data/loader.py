"""Batches: a data set opened and checked once, decoded by Grain on each host, put on the mesh.

The global batch of step s is entries [s * B, (s + 1) * B) of the training sequence, on every
topology; `rows` are those of it that this host's devices hold, and nothing else is read.
"""

import concurrent.futures
import functools
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
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
from supmim_jax.data import transforms, worker
from supmim_jax.data.decode import BrokenRecord, decode_image
from supmim_jax.data.sampler import NONE, EvaluationRecord, Intact, LocalPosition, TrainingOrder
from supmim_jax.data.source import Records, Source
from supmim_jax.data.token_cache import TokenCache
from supmim_jax.data.transforms import eval_image, whole_image
from supmim_jax.errors import ConfigError, SetupError

Item = TypeVar("Item")
Arrays = dict[str, np.ndarray]  # of the examples of a batch, by the fields of Batch

ON_DEVICES = 2  # batches that wait on the devices


class Dataset:
    """The data of a run. Splits are opened and checked when they are first asked for, and kept."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        self.tokens: TokenCache | None = None  # of `open` alone
        self.opened: dict[tuple[str, str], Records] = {}

    @classmethod
    def open(cls, cfg: Config) -> "Dataset":
        """All data that a run of `cfg` reads; `fractals` are made if need be.

        Raises:
          SetupError: a split or the token cache is missing or is not what the config says.
        """
        dataset = cls(cfg)
        dataset.training_records()
        if not cfg.needs_masks:
            dataset.records(cfg.data.eval_split)
        if cfg.evaluates_masks:
            dataset.records(cfg.data.eval_split, "mask")
        if cfg.tokens.cache:
            dataset.tokens = TokenCache.open(cfg, dataset.source.version)
        return dataset

    @functools.cached_property
    def source(self) -> Source:
        return Source(self.cfg.data)

    def records(self, split: str, beside: str = "label") -> Records:
        """The encoded records of a split, with "label" or "mask" beside "image"; see Source."""
        if (split, beside) not in self.opened:
            self.opened[split, beside] = self.source.records(split, beside)
        return self.opened[split, beside]

    def class_names(self, split: str = "") -> list[str]:
        """Names of the labels, in order; a name that is only a number becomes "class 7"."""
        records = self.records(split or self.cfg.data.train_split)
        names = records.features[self.cfg.data.label_field].names
        return [f"class {name}" if name.isdecimal() else name for name in names]

    def training_records(self) -> Records:
        """The records of the training split, with what the objective learns from.

        Raises:
          SetupError: as `records`, or their number is not config.data.train_examples.
        """
        data = self.cfg.data
        records = self.records(data.train_split, "mask" if self.cfg.needs_masks else "label")
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
          boxes: what contrastive crops are around, uint8 Nx4 as in transforms.py; for
            data.contrastive_crop.boxes = "heat_map" alone. None: there are none yet.
          skipped: batches of the sequence that the run leaves out before `first_step`.
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
        cfg, data, records = self.cfg, self.cfg.data, self.training_records()
        examples = (
            grain.MapDataset.range(len(rows) * (cfg.total_steps - first_step))
            .map(LocalPosition(rows, cfg.batch_size, first_step + skipped))
            .map(TrainingOrder(len(records), cfg.seed, data.repeats))
            .map(Intact(records, self.train_example(boxes)))
        )
        # An evaluation's batches, of image and mask, need shared memory later on: known now.
        example = data.image_size**2 * (data.channels + 4 * cfg.evaluates_masks)
        later = cfg.eval.batch_size * len(rows) // cfg.batch_size * example
        remedy = "another record stands in for it"
        where = (data, data.train_split, remedy)
        return HostBatches(examples, len(rows), *where, later=later, beside=bool(cfg.eval.every))

    def train_example(self, boxes: np.ndarray | None = None) -> Callable[[tuple], dict]:
        """The function that turns a training record into an example, with tokens of the cache."""
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
        return self._once(split, mesh, transforms.MaskedExample(self.cfg.data), "mask")

    def _once(self, split: str, mesh: Mesh, make: Any, beside: str = "label") -> Iterator[Batch]:
        size = self.cfg.eval.batch_size
        host = self.once_on_host(split, local_rows(size, mesh), make, beside)
        return _on_mesh(host, size, mesh)

    def once_on_host(
        self, split: str, rows: Sequence[int], make: Any, beside: str = "label"
    ) -> "HostBatches":
        """Every example of `split` once: the `rows` of each global batch, as `make` makes them."""
        cfg, records = self.cfg, self.records(split, beside)
        examples = (
            grain.MapDataset.range(len(rows) * math.ceil(len(records) / cfg.eval.batch_size))
            .map(LocalPosition(rows, cfg.eval.batch_size))
            .map(EvaluationRecord(records))
            .map(make)
        )
        remedy = "it counts as a grey image, if its label can be read"
        return HostBatches(examples, len(rows), cfg.data, split, remedy)

    def target_images(self, records: range, batch_size: int) -> "HostBatches":
        """The images of these records of a token cache, and the marks of their files.

        Record v * examples + i is view v of example i. Batches have "image", uint8 BxHxWxC, and
        "mark", uint32 B; the last may be smaller.
        """
        data, images = self.cfg.data, self.training_records()
        examples = (
            grain.MapDataset.range(records.start, records.stop)
            .map(lambda record: divmod(record, len(images)))
            .map(Intact(images, transforms.TargetExample(self.train_example())))
        )
        remedy = "it has the tokens of another"
        return HostBatches(examples, batch_size, data, data.train_split, remedy, drop=False)

    def first_images(self, count: int) -> np.ndarray:
        """The first `count` training images that are whole, as evaluation sees them: uint8 NxHxWxC.

        Fewer where there are fewer; raises SetupError if there is none.
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
    """The batches of a run, and how many of its records were broken; see Dataset.train."""

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
        # `map`, as a generator's variable keeps a batch while it waits for the next.
        counted = map(lambda batch: (batch, before + host.broken), batches)
        self.batches = Prefetch(counted, ON_DEVICES)

    def restart(self, step: int, boxes: np.ndarray | None) -> None:
        """Continues after `step` steps with other boxes, as `Dataset.train` would from there.

        Batches that were made ahead are dropped, and broken records in them do not count.
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

        Raises SetupError if they are more than config.data.max_broken allows.
        """
        here, cfg = self.here, self.dataset.cfg
        if jax.process_count() > 1:
            here = int(multihost_utils.process_allgather(np.int32(here)).sum())
        broken, read = self.before + here, step * cfg.batch_size
        if broken > cfg.data.max_broken * max(read, cfg.data.train_examples):
            raise SetupError(
                f"{broken} of {read} records of {cfg.data.name!r} that were read were broken, more "
                f"than config.data.max_broken = {cfg.data.max_broken:g} allows. The log on stderr "
                f"names each: remove the data set's directory and prepare it again, or allow more."
            )
        return broken


class HostBatches(Iterator[Arrays]):
    """Batches of `size` examples, each decoded ahead by one thread or process of this host.

    Counts the records of `split` that are broken, and logs each once; `remedy` says what becomes
    of it. A last batch that is smaller is dropped or not. Raises SetupError if workers lack shared
    memory, also for batches of `later` bytes, asked for while these workers wait (`beside`) or not.
    """

    def __init__(
        self,
        examples: grain.MapDataset,
        size: int,
        data: DataConfig,
        split: str,
        remedy: str,
        *,
        later: int = 0,
        beside: bool = False,
        drop: bool = True,
    ):
        self.broken, self.logged = 0, set()
        self.where, self.remedy = f"{data.name}, split {split},", remedy
        batches = examples.batch(size, drop_remainder=drop)
        threads, ahead = data.threads, max(data.prefetch, data.threads)
        if not data.workers:
            self.batches = iter(batches.to_iter_dataset(grain.ReadOptions(threads, ahead)))
            return
        first = examples[0] if len(examples) else {}
        pages = (math.ceil(size * np.asarray(x).nbytes / worker.PAGE) for x in first.values())
        now = worker.PAGE * sum(pages)
        worker.check_room(data.workers, now + later if beside else max(now, later))
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags
            flags.FLAGS.mark_as_parsed()
        worker.keep_light()
        options = grain.MultiprocessingOptions(num_workers=data.workers)
        local = batches.to_iter_dataset(grain.ReadOptions(1, 1))
        self.batches = iter(local.mp_prefetch(options))

    def close(self) -> None:
        """Ends the threads or processes that decode."""
        self.batches.close()

    def __next__(self) -> Arrays:
        try:
            arrays = next(self.batches)
        except RuntimeError as error:
            raise worker.ended(error) from None
        ids = arrays.pop("broken")
        for example in ids[ids != NONE].tolist():
            self.broken += 1
            if example not in self.logged:
                self.logged.add(example)
                logging.error("Record %d of %s is broken; %s.", example, self.where, self.remedy)
        return arrays


class Prefetch(Iterator[Item], Generic[Item]):
    """`items`, up to `most` of them prepared by a thread; exceptions come in the item's place.

    Not Grain's own prefetching: that is for Grain's data sets, whose iterators have a state to
    save, and these items are on devices.
    """

    def __init__(self, items: Iterator[Item], most: int):
        self.items, self.pool = items, concurrent.futures.ThreadPoolExecutor(1, "prefetch")
        # One more, which the thread is at while the others wait.
        self.pending = deque(self.pool.submit(next, items) for _ in range(most + 1))
        # Also where a consumer is dropped without `close`, no more are made.
        self.end = weakref.finalize(self, self.pool.shutdown, wait=False, cancel_futures=True)

    def __next__(self) -> Item:
        if not self.pending:
            raise StopIteration
        try:
            item = self.pending[0].result()
        except BaseException:  # StopIteration too; it stays where it is, and the thread ends
            self.end()
            raise
        self.pending.popleft()
        self.pending.append(self.pool.submit(next, self.items))
        return item

    def close(self) -> None:
        """Ends the thread, which still finishes and drops the current item. May be repeated."""
        self.pool.shutdown(cancel_futures=True)
        self.pending.clear()


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, in order."""
    layout = NamedSharding(mesh, sharding.BATCH)
    indices = layout.addressable_devices_indices_map((batch_size,))
    spans = {span.indices(batch_size)[:2] for (span,) in indices.values()}
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _on_mesh(batches: Iterator[Arrays], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
    """This process's rows as its part of each global batch."""
    layout = NamedSharding(mesh, sharding.BATCH)
    place = {row: i for i, row in enumerate(local_rows(batch_size, mesh))}

    def put(x: np.ndarray) -> jax.Array:
        def shard(index):
            start, stop, _ = index[0].indices(batch_size)
            return x[place[start] : place[stop - 1] + 1]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), layout, shard)

    def batch(arrays: Arrays) -> Batch:
        fields = {name: put(x) for name, x in arrays.items()}
        views = [fields.pop(name) for name in ("image", "second_image") if name in fields]
        return Batch(tuple(views), **fields)

    return map(batch, batches)
