"""Global batches on the mesh, of what each host feeds (feed.py)."""

from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax.config import Config, SetupError
from supmim_jax.data import feed
from supmim_jax.data.ahead import Ahead
from supmim_jax.types import Batch

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
        self.feed = fed = feed.training(cfg, rows, first_step, boxes, self.skipped)
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
    return _on_mesh(feed.evaluation(cfg, split, rows), cfg.eval.batch_size, mesh)


def whole_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """`eval_dataset` with the whole images, resized to squares: for boxes in them."""
    rows = local_rows(cfg.eval.batch_size, mesh)
    return _on_mesh(feed.whole(cfg, split, rows), cfg.eval.batch_size, mesh)


def masked_dataset(cfg: Config, split: str, mesh: Mesh) -> Iterator[Batch]:
    """`eval_dataset` with masks in place of labels, cropped as the images are."""
    rows = local_rows(cfg.eval.batch_size, mesh)
    return _on_mesh(feed.masked(cfg, split, rows), cfg.eval.batch_size, mesh)


def local_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """Rows of the global batch that this process's devices hold, in order."""
    indices = NamedSharding(mesh, ROWS).addressable_devices_indices_map((batch_size,))
    spans = {span.indices(batch_size)[:2] for (span,) in indices.values()}
    return tuple(row for start, stop in sorted(spans) for row in range(start, stop))


def _on_mesh(batches: Iterator[feed.Arrays], batch_size: int, mesh: Mesh) -> Iterator[Batch]:
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
