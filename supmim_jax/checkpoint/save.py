"""The checkpoints of a run in training: saved in the background, kept by rules."""

import contextlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import multihost as orbax_multihost

from supmim_jax import multihost, storage
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import checksums
from supmim_jax.checkpoint.checksums import Damaged
from supmim_jax.checkpoint.restore import Best, Checkpoint, Names, plain, steps, unfinished
from supmim_jax.config import CheckpointConfig, Config
from supmim_jax.config.configdict import to_configdict
from supmim_jax.errors import OF_THE_USER, SetupError

NAMES = ("state", "run", "config", "boxes")
# Beside the arrays: orbax's indices and metadata (1 kB an array), the sums, blocks half filled.
MARGIN_SHARE, MARGIN = 0.02, 1 << 20

_times = itertools.count()  # for barriers, whose names are used once


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`; saving is asynchronous.

    A save appears under its name with all its files, or not at all; what a killed one left is
    removed when the next process of the run makes its `Checkpoints`.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        cfg: CheckpointConfig,
        scheduled: Callable[[int], bool] | None = None,
    ):
        """Opens the directory, or makes it.

        Args:
          workdir: of the run.
          cfg: how many stay.
          scheduled: whether a checkpoint after a step is due at all; default: by cfg.every.

        Raises:
          SetupError: the directory cannot be made.
        """
        self.scheduled = scheduled or (lambda step: step % cfg.every == 0)
        self.workdir, self.cfg = storage.location(workdir), cfg
        self.directory = self.workdir / "checkpoints"
        self.best = Best(cfg.keep_best, self.workdir)
        self.failure: BaseException | None = None  # of a save in the background
        self.saving: int | None = None  # the step last begun to be saved
        with self._explained("made"):
            storage.make_directory(self.directory)
            self.manager = self._open_manager()

    @classmethod
    def open(cls, workdir: str | os.PathLike, cfg: Config, state: TrainState) -> "Checkpoints":
        """The checkpoints of a run of `cfg`, whose `state` may be abstract.

        Raises:
          SetupError: the directory cannot be made, or the disk has no room for another one.
        """
        checkpoints = cls(workdir, cfg.checkpoint, cfg.saves_after)
        checkpoints.check_disk_space(plain(state))
        multihost.finish_first(checkpoints.wait)
        return checkpoints

    def _open_manager(self) -> ocp.CheckpointManager:
        # Not by orbax, which does it in the background: two of its managers, one after the other,
        # would remove the same directory.
        if jax.process_index() == 0:
            for path in unfinished(self.directory):
                path.rmtree(missing_ok=True)
        multihost.barrier(f"unfinished saves, {next(_times)}")
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=RetentionPolicy(self.cfg, self.best, self.scheduled),
            step_name_format=Names(),
            temporary_path_class=checksums.temporary_path_class(self.directory),
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=self._barrier,
                # Where none can be made, others of orbax's threads would wait for it for minutes,
                # and keep the process from ending.
                create_directories_asynchronously=False,
            ),
        )
        return ocp.CheckpointManager(self.directory, options=options, item_names=NAMES)

    def latest(self) -> int | None:
        """The newest complete step; its files are not verified."""
        return self.manager.latest_step()

    def newest(self, use_older: bool = False) -> Checkpoint | None:
        """The checkpoint to continue from; None if there is none.

        Args:
          use_older: sets damaged ones aside, as `checkpoints/<step>.damaged`, until one is whole.

        Raises:
          SetupError: the newest is damaged, without `use_older`.
        """
        while (step := self.latest()) is not None:
            try:
                return Checkpoint.read(self.directory / str(step))
            except Damaged as error:
                if not use_older:
                    raise
                self._set_aside(step, str(error))
        return None

    def _set_aside(self, step: int, problem: str) -> None:
        self.manager.close()
        if jax.process_index() == 0:
            aside, count = self.directory / f"{step}.damaged", 1
            while aside.exists():
                count += 1
                aside = self.directory / f"{step}.damaged-{count}"
            with self._explained(f"renamed to {aside.name}"):
                (self.directory / str(step)).rename(aside)
            left = steps(self.workdir)
            then = f"step {left[-1]}" if left else "step 0, as there is no other checkpoint"
            text = f"{problem.partition('. ')[0]}. It is kept as {aside}; going on from {then}."
            print(text, file=sys.stderr, flush=True)
        multihost.barrier(f"set aside {step}")
        self.manager = self._open_manager()

    def check_disk_space(self, *arrays: Any) -> None:
        """Raises SetupError if a checkpoint of these trees (or shapes) does not fit on the disk.

        All hosts write into the one directory, so one process asks, for all of them.
        """
        if jax.process_index() == 0:
            cure = (
                f"{self._state()} Free some room, or move --workdir to a larger disk; the same "
                f"command then goes on."
            )
            needed = bytes_on_disk(arrays)
            storage.check_disk_space(self.directory, needed, "a checkpoint", cure)

    def save(
        self, state: TrainState, cfg: Config, run: dict, boxes: np.ndarray | None = None
    ) -> None:
        """Starts to save the state once the previous save has ended; does nothing if it is saved.

        Args:
          state: on the devices.
          cfg: the run's config.
          run: plain numbers under the names of BEGIN.
          boxes: uint8 Nx4 that the images are cropped by, where there are any.

        Raises:
          SetupError: there is no room, or it cannot be written, or the save before failed.
        """
        self.wait()
        step, tree = int(state.step), plain(state)
        if self.latest() == step:
            return
        self.check_disk_space(tree, boxes)
        items = {
            "state": ocp.args.StandardSave(tree),
            "run": ocp.args.JsonSave(run),
            "config": ocp.args.JsonSave(to_configdict(cfg).to_dict()),
        }
        if boxes is not None:
            items["boxes"] = ocp.args.StandardSave({"boxes": boxes})
        self.saving = step
        with self._explained("saved"):
            self.manager.save(step, args=ocp.args.Composite(**items))

    def back_to_scheduled(self) -> int:
        """Removes all checkpoints after the newest scheduled one; returns its step, or 0.

        One rename takes each out of the steps, so that none is seen half removed. All processes
        must call it.

        Raises:
          SetupError: they cannot be removed.
        """
        self.wait()
        saved = sorted(self.manager.all_steps())
        newest = max(filter(self.scheduled, saved), default=0)
        if not newest and saved and any(map(self.scheduled, range(1, saved[0]))):
            newest = saved[0]  # the schedule is another one now
        self.manager.close()
        if jax.process_index() == 0:
            for step in saved:
                if step > newest:
                    self._remove(step)
        multihost.barrier(f"back to {newest}, {next(_times)}")
        self.manager = self._open_manager()
        return newest

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; it first gets the name of what a killed save leaves."""
        directory = self.directory / str(step)
        removed = self.directory / f"{step}.removed.orbax-checkpoint-tmp"
        with self._explained("removed"):
            if storage.is_local(directory):
                directory.rename(removed)
                removed.rmtree()
            else:  # a bucket has no renames; without this file it is no step any more
                (directory / "commit_success.txt").unlink()
                directory.rmtree()

    def check(self) -> None:
        """Raises SetupError if a save in the background has failed; cheap, for every step."""
        if self.failure is not None:
            with self._explained("saved"):
                raise self.failure

    def wait(self) -> None:
        """Waits until all saves are complete.

        Raises:
          SetupError: one of them failed.
        """
        self.check()
        with self._explained("saved"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`; afterwards nothing can be saved."""
        self.wait()
        multihost.finish_first(None)
        self.manager.close()

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """orbax's barrier, which notes a failure first.

        A save that fails in one process has it wait here for the others, which may never come.
        """
        if (error := sys.exc_info()[1]) is not None:
            self.failure = self.failure or error
        orbax_multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        """Explains a file system error that a person must fix (OF_THE_USER).

        Any other error passes unchanged: it may be gone on the next try. `done` is what was being
        done to the checkpoint, as a past participle.
        """
        what = self.directory if self.saving is None else self.directory / str(self.saving)
        try:
            yield
        except Exception as error:  # orbax and TensorStore raise many
            number = _errno(error)
            if isinstance(error, SetupError) or number not in OF_THE_USER:
                raise
            raise SetupError(
                f"{what} could not be {done} ([Errno {number}] {os.strerror(number)}). "
                f"{self._state()} See to the room and the permissions there; the same command "
                f"then goes on."
            ) from error

    def _state(self) -> str:
        """What remains when a checkpoint cannot be saved."""
        intact = steps(self.workdir)
        if not intact:
            return "There is none before it."
        return f"The one before it, step {intact[-1]}, is intact."


@dataclass
class RetentionPolicy(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps what any rule of `cfg` keeps, and the newest checkpoint that was `scheduled`.

    A run rolls back to that one; repeated SIGTERMs would otherwise push it out.
    """

    cfg: CheckpointConfig
    best: Best
    scheduled: Callable[[int], bool]

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """For orbax, which asks as each save begins."""
        saved, every = [x.step for x in checkpoints], self.cfg.keep_every
        kept = {*saved[-self.cfg.keep :], self.best.step(saved)}
        kept.add(max(filter(self.scheduled, saved), default=None))
        return [step in kept or (every > 0 and step % every == 0) for step in saved]


def bytes_on_disk(arrays: Any) -> int:
    """Bytes of a tree of arrays, or of their shapes, as all hosts together write them.

    orbax compresses, by a few per cent for trained weights: this much is not relied on.
    """
    leaves = (x if hasattr(x, "dtype") else np.asarray(x) for x in jax.tree.leaves(arrays))
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in leaves)
    return size + int(MARGIN_SHARE * size) + MARGIN


def _errno(error: Exception) -> int | None:
    """The system's error number, which TensorStore puts at the end of a long text."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None
