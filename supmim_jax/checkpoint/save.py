"""The checkpoints of a run that trains: saved in the background, kept by rules, restored.

Whether a checkpoint fits onto the disk, asked before it is begun.

Failures of the file system in a save, told to the user."""

import contextlib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization
from orbax.checkpoint import multihost

from supmim_jax import multihost as multihost_module
from supmim_jax import storage
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import checksums, restore, retention
from supmim_jax.checkpoint.checksums import Damaged, verify
from supmim_jax.config import CheckpointConfig, Config
from supmim_jax.config.configdict import to_configdict
from supmim_jax.errors import OF_THE_USER, SetupError

# Beside the arrays: orbax's indices and metadata (1 kB an array), the sums, blocks half filled.
MARGIN_SHARE, MARGIN = 0.02, 1 << 20


def needed(arrays: Any) -> int:
    """Bytes on disk of a tree of arrays, or of their shapes, as all hosts together write it.

    orbax compresses, by a few per cent for trained weights: this much is not relied on.
    """
    leaves = jax.tree.leaves(arrays)
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in map(_array, leaves))
    return size + int(MARGIN_SHARE * size) + MARGIN


def check(directory: epath.Path, arrays: Any, intact: list[int]) -> None:
    """Raises SetupError if the file system of `directory` has no room for these arrays.

    All hosts write into the one directory, so one process asks, for all of them. What a quota
    leaves is not known, nor of gs:// anything.

    Args:
      directory: of the run's checkpoints.
      arrays: what is to be saved, or its shapes.
      intact: steps that are saved.
    """
    if jax.process_index() != 0:
        return
    free, wanted = storage.free_bytes(directory), needed(arrays)
    if free is not None and free < wanted:
        raise SetupError(
            f"{directory} has no room for a checkpoint: {_shown(free)} are free, and it takes "
            f"{_shown(wanted)}. {state(intact)} Free some room, or move --workdir to a larger "
            f"disk; the same command then goes on."
        )


def state(intact: list[int]) -> str:
    """What is left when a checkpoint cannot be saved."""
    if not intact:
        return "There is none before it."
    return f"The one before it, step {intact[-1]}, is intact."


def _shown(size: int) -> str:
    return f"{size} bytes ({size / 2**30:.2f} GiB)"


def _array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else np.asarray(x)


@contextlib.contextmanager
def explained(what: epath.Path, done: str, workdir: epath.Path) -> Iterator[None]:
    """Explains an error of the file system that a person must fix (OF_THE_USER).

    The message says which checkpoints remain and what to do. Any other error passes unchanged: it
    may be gone on the next try.

    Args:
      what: the path being written.
      done: what was being done to it, as a past participle ("saved").
      workdir: the run's directory.

    Raises:
      SetupError: for an error that a person must fix.
    """
    try:
        yield
    except Exception as error:  # orbax and TensorStore raise many
        number = _number(error)
        if isinstance(error, SetupError) or number not in OF_THE_USER:
            raise
        raise SetupError(
            f"{what} could not be {done} ([Errno {number}] {os.strerror(number)}). "
            f"{state(restore.steps(workdir))} See to the room and the permissions there; the "
            f"same command then goes on."
        ) from error


def _number(error: Exception) -> int | None:
    """What the system said; TensorStore has its number at the end of a long text."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None


_times = itertools.count()  # for barriers, whose names are used once
NAMES = ("state", "run", "config", "boxes")


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
        """Opens or makes them.

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
        self.best = retention.Best(cfg.keep_best, self.workdir)
        self.failure: BaseException | None = None  # of a save in the background
        self.saving: int | None = None  # the step last begun to be saved
        with self._explained("made"):
            storage.make_directory(self.directory)
            self.manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        # Not by orbax, which does it in the background: two of its managers, one after the other,
        # would remove the same directory.
        if jax.process_index() == 0:
            for path in restore.unfinished(self.directory):
                path.rmtree(missing_ok=True)
        multihost_module.barrier(f"unfinished saves, {next(_times)}")
        options = ocp.CheckpointManagerOptions(
            create=False,
            preservation_policy=retention.policy(self.cfg, self.best, self.scheduled),
            step_name_format=restore.Names(),
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
        """The newest complete step; whether its files are whole is not looked at."""
        return self.manager.latest_step()

    def newest(self, use_older: bool = False) -> int | None:
        """The step to go on from, whose files are whole; None: there is no checkpoint.

        Args:
          use_older: sets damaged ones aside, as `checkpoints/<step>.damaged`, until one is whole.

        Raises:
          SetupError: the newest is damaged, without `use_older`.
        """
        while (step := self.latest()) is not None:
            try:
                verify(self.directory / str(step))
                return step
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
            left = restore.steps(self.workdir)
            then = f"step {left[-1]}" if left else "step 0, as there is no other checkpoint"
            text = f"{problem.partition('. ')[0]}. It is kept as {aside}; going on from {then}."
            print(text, file=sys.stderr, flush=True)
        multihost_module.barrier(f"set aside {step}")
        self.manager = self._open()

    def check_room(self, state: TrainState) -> None:
        """Raises SetupError if a checkpoint of this state, or abstract state, has no room."""
        check(self.directory, restore.plain(state), restore.steps(self.workdir))

    def save(
        self, state: TrainState, cfg: Config, run: dict, boxes: np.ndarray | None = None
    ) -> None:
        """Starts to save the state, once the save before has ended; nothing if the step is saved.

        Args:
          state: on the devices.
          cfg: the run's config.
          run: plain numbers under the names of BEGIN.
          boxes: uint8 Nx4 that the images are cropped by, where there are any.

        Raises:
          SetupError: there is no room, or it cannot be written, or the save before failed.
        """
        self.wait()
        step = int(state.step)
        if self.latest() == step:
            return
        check(self.directory, (restore.plain(state), boxes), restore.steps(self.workdir))
        items = {
            "state": ocp.args.StandardSave(restore.plain(state)),
            "run": ocp.args.JsonSave(run),
            "config": ocp.args.JsonSave(to_configdict(cfg).to_dict()),
        }
        if boxes is not None:
            items["boxes"] = ocp.args.StandardSave({"boxes": boxes})
        self.saving = step
        with self._explained("saved"):
            self.manager.save(step, args=ocp.args.Composite(**items))

    def back_to_scheduled(self) -> int:
        """Removes the checkpoints after the newest scheduled one, whose step it returns; or 0.

        One rename takes each out of the steps, so that none is seen half removed. All processes
        must call it.

        Raises:
          SetupError: they cannot be removed.
        """
        self.wait()
        steps = sorted(self.manager.all_steps())
        newest = max(filter(self.scheduled, steps), default=0)
        if not newest and steps and any(map(self.scheduled, range(1, steps[0]))):
            newest = steps[0]  # the schedule is another one now
        self.manager.close()
        if jax.process_index() == 0:
            for step in steps:
                if step > newest:
                    self._take_out(step)
        multihost_module.barrier(f"back to {newest}, {next(_times)}")
        self.manager = self._open()
        return newest

    def _take_out(self, step: int) -> None:
        """Removes a checkpoint: first its name, for one that is left of a save that was killed."""
        directory = self.directory / str(step)
        removed = self.directory / f"{step}.removed.orbax-checkpoint-tmp"
        with self._explained("removed"):
            if storage.is_local(directory):
                directory.rename(removed)
                removed.rmtree()
            else:  # a bucket has no renames; without this file it is no step any more
                (directory / "commit_success.txt").unlink()
                directory.rmtree()

    def found(self, step: int, results: dict[str, float]) -> None:
        """Tells what the evaluation of `step` gave, for config.checkpoint.keep_best.

        Raises:
          SetupError: that metric is not among it.
        """
        self.best.found(step, results)

    def check(self) -> None:
        """Raises SetupError if a save in the background has failed; cheap, for every step."""
        if self.failure is not None:
            with self._explained("saved"):
                raise self.failure

    def wait(self) -> None:
        """Returns when no save is under way: all that were begun are complete.

        Raises:
          SetupError: one of them failed.
        """
        self.check()
        with self._explained("saved"):
            self.manager.wait_until_finished()

    def close(self) -> None:
        """As `wait`; nothing can be saved after it."""
        self.wait()
        self.manager.close()

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """The state of `step`, laid out like the abstract `like`, and its `run` numbers.

        Raises:
          SetupError: the checkpoint is damaged, or of another step, or holds other paths, shapes
            or dtypes.
        """
        directory = self.directory / str(step)
        found = restore.restore_item(directory, "state", restore.plain(like))
        if int(found["step"]) != step:
            raise SetupError(
                f"{directory} is damaged: it holds the state of step {int(found['step'])}. "
                f"{checksums.ANOTHER}"
            )
        found = serialization.from_state_dict(like, {"ema": {}} | found)
        return found, restore.read_run(directory)

    def restore_boxes(self, step: int, cfg: Config) -> np.ndarray | None:
        """The boxes that the run crops by after `step`, uint8 Nx4; None before the first pass.

        Raises:
          SetupError: they are missing, or of another number of images.
        """
        if not cfg.steps_per_boxes or step < cfg.steps_per_boxes:
            return None
        like = {"boxes": np.zeros((cfg.data.train_examples, 4), np.uint8)}
        return restore.restore_item(self.directory / str(step), "boxes", like)["boxes"]

    def _barrier(self, *, key: str, timeout_ms: int) -> None:
        """orbax's barrier, which notes a failure first.

        A save that fails in one process has it wait here for the others, which may never come.
        """
        if (error := sys.exc_info()[1]) is not None:
            self.failure = self.failure or error
        multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)

    def _explained(self, done: str) -> contextlib.AbstractContextManager:
        what = self.directory if self.saving is None else self.directory / str(self.saving)
        return explained(what, done, self.workdir)
