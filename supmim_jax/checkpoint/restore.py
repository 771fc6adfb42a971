"""Reads checkpoints: finds them, verifies them once, and restores them strictly.

`workdir/checkpoints/<step>` holds the state, the run's numbers, the config and, if crops follow
boxes, the boxes. Paths, shapes and dtypes are compared with the disk, both ways, before an array is
read: orbax alone accepts a misspelt subtree or another depth.
"""

import contextlib
import datetime
import logging
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from supmim_jax import metrics, storage
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint.checksums import ANOTHER, Damaged, verify
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import SetupError, first_few
from supmim_jax.sharding import path_name

# orbax warns of a file that only its CheckpointManager writes, and only that reads.
logging.getLogger("absl").addFilter(lambda x: "Metadata file does not exist" not in x.getMessage())

BEST, EMA = "best", "@ema"
STEP = re.compile(r"0|[1-9]\d*")
TEMPORARY = ".orbax-checkpoint-tmp"

# Numbers of a run that has not begun.
BEGIN = {
    "position": 0,  # examples of the training sequence that lie behind it
    "seconds": 0.0,  # of training
    "broken_records": 0,  # that others stood in for
    "skipped_batches": 0,  # of the sequence, left out after NaN
    "roll_backs": 0,
}


@dataclass(frozen=True)
class Checkpoint:
    """One saved step of a run, verified when it was opened.

    `config` is that of the run, `run` its numbers under the names of BEGIN.
    """

    directory: epath.Path
    config: Config
    run: dict[str, float]

    @classmethod
    def open(cls, location: str) -> "Checkpoint":
        """The checkpoint at `workdir`, `workdir@step` or `workdir@best`, local or gs://.

        With `@ema` behind it, the run must have a moving average of its parameters; where it has
        one, that is what `restore_params` takes with or without it. Of several processes all must
        call this alike.

        Raises:
          SetupError: there is no such workdir, checkpoint, step or average, none is known to be
            the best, or the checkpoint is damaged.
        """
        checkpoint = cls.read(locate(location))
        if location.endswith(EMA) and not checkpoint.config.optim.ema:
            raise SetupError(
                f"{location}: that run has no moving average of its parameters (config.optim.ema "
                f"is 0). Leave out {EMA}, or train with --config.optim.ema=0.9999."
            )
        return checkpoint

    @classmethod
    def read(cls, directory: epath.Path) -> "Checkpoint":
        """The checkpoint in the directory of a step.

        Raises:
          SetupError: it is damaged, or in the directory of another step.
        """
        verify(directory)
        run, config = (
            storage.read_json(directory / item / "metadata", ANOTHER) for item in ("run", "config")
        )
        cfg, run = from_configdict(config), BEGIN | run
        skipped = run["skipped_batches"]
        if run["position"] != (int(directory.name) + skipped) * cfg.batch_size:
            raise Damaged(
                f"{directory} is damaged: it was saved after {run['position']} examples in batches "
                f"of {cfg.batch_size}, of which {skipped} were left out, not after step "
                f"{directory.name}: directories were renamed. {ANOTHER}"
            )
        return cls(directory, cfg, run)

    @property
    def step(self) -> int:
        return int(self.directory.name)

    @property
    def workdir(self) -> epath.Path:
        return self.directory.parent.parent

    @property
    def epochs(self) -> float:
        """Epochs that were trained when it was saved."""
        return self.run["position"] / self.config.data.train_examples

    def tree(self, item: str = "state") -> dict:
        """Shapes and dtypes of a saved item, without restoring it."""
        with self._readable(item):
            metadata = ocp.PyTreeCheckpointer().metadata(self.directory / item)
            return dict(metadata.item_metadata.tree)

    def check_params(self, like: dict) -> str:
        """Where `restore_params` finds the parameters: `ema` or `params`.

        Raises:
          SetupError: a subtree of `like` is missing or differs in paths, shapes or dtypes.
        """
        tree = self.tree()
        where = "ema" if tree.get("ema") else "params"
        stored = tree.get(where, {})
        if missing := sorted(set(like) - set(stored)):
            raise SetupError(
                f"{self.directory} has no {where}/{f', {where}/'.join(missing)}; it has "
                f"{', '.join(f'{where}/{name}' for name in sorted(stored))}."
            )
        self._check_same({name: stored[name] for name in like}, like)
        return where

    def restore_params(self, like: dict) -> dict:
        """The subtrees of the parameters that the abstract `like` names (`encoder`, `head`).

        Of a run with config.optim.ema they are those of the moving average.

        Raises:
          SetupError: as `check_params`.
        """
        where = self.check_params(like)
        return self._restore("state", {where: like})[where]

    def restore_state(self, like: TrainState) -> TrainState:
        """The whole state, laid out like the abstract `like`.

        Raises:
          SetupError: it holds another step, or other paths, shapes or dtypes.
        """
        self._check_same(self.tree(), plain(like))
        stored = self._restore("state", plain(like))
        if int(stored["step"]) != self.step:
            raise Damaged(
                f"{self.directory} is damaged: it holds the state of step {int(stored['step'])}. "
                f"{ANOTHER}"
            )
        return serialization.from_state_dict(like, {"ema": {}} | stored)

    def restore_boxes(self) -> np.ndarray | None:
        """The boxes that the run crops by from here, uint8 Nx4; None before the first pass.

        Raises:
          SetupError: they are missing, or of another number of images.
        """
        every = self.config.steps_per_boxes
        if not every or self.step < every:
            return None
        like = {"boxes": np.zeros((self.config.data.train_examples, 4), np.uint8)}
        self._check_same(self.tree("boxes"), like)
        return self._restore("boxes", like)["boxes"]

    def _restore(self, item: str, like: dict) -> dict:
        """The part of a saved item that `like` names, laid out like it. They were compared."""
        layout = ocp.checkpoint_utils.construct_restore_args(like)
        part = ocp.args.PyTreeRestore(item=like, restore_args=layout, partial_restore=True)
        with self._readable(item):
            return ocp.PyTreeCheckpointer().restore(self.directory / item, args=part)

    def _check_same(self, stored: Any, wanted: Any) -> None:
        """Raises SetupError, naming paths, unless both trees have the same arrays."""
        on_disk, asked = _shapes(stored), _shapes(wanted)
        problems = [
            f"{path} is {on_disk.get(path, 'not')} in the checkpoint, "
            f"{asked.get(path, 'not')} in the model"
            for path in sorted(on_disk.keys() | asked.keys())
            if on_disk.get(path) != asked.get(path)
        ]
        if problems:
            raise SetupError(
                f"{self.directory} is of another architecture or optimizer: "
                f"{first_few(problems)}. Use the config that is saved beside it, or "
                f"another --workdir."
            )

    @contextlib.contextmanager
    def _readable(self, item: str) -> Iterator[None]:
        """Explains errors of reading files that are whole: the disk fails, or they are unusable."""
        try:
            yield
        except jax.errors.JaxRuntimeError:  # memory, or another process
            raise
        except Exception as error:  # orbax has no narrower one
            reason = str(error).partition(" See ")[0][:200]
            raise SetupError(
                f"{self.directory} is not a readable checkpoint: its `{item}` is missing or "
                f"incomplete ({type(error).__name__}: {reason}). {ANOTHER}"
            ) from None


def plain(state: TrainState) -> dict:
    """The state as nested dicts with string keys, the optimizer's tuples too."""
    tree = serialization.to_state_dict(state)
    if not tree["ema"]:  # as in the checkpoints from before there were any
        del tree["ema"]
    return tree


def steps(workdir: str | epath.Path) -> list[int]:
    """Steps of a run's complete checkpoints, oldest first; not those that were set aside."""
    return sorted(x.step for x in Names().find_all(storage.location(workdir) / "checkpoints"))


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """The directories that killed saves left behind."""
    complete = {x.path.name for x in Names().find_all(directory)}
    return [
        path
        for path in storage.children(directory)
        if TEMPORARY in path.name or (STEP.fullmatch(path.name) and path.name not in complete)
    ]


def split_step(location: str) -> tuple[str, int | str | None]:
    """`workdir@step[@ema]` as (workdir, step), where step may be "best"; other @ are the path's."""
    location = location.removesuffix(EMA)
    match = re.fullmatch(rf"(.*)@(\d+|{BEST})", location)
    if match is None:
        return location, None
    return match[1], match[2] if match[2] == BEST else int(match[2])


def locate(location: str) -> epath.Path:
    """The directory that `Checkpoint.open` would open; nothing in it is read.

    Raises:
      SetupError: there is no such workdir, checkpoint or step, or none is known to be the best.
    """
    workdir, step = split_step(location)
    root, there = storage.location(workdir) / "checkpoints", steps(workdir)
    if not there:
        given = root.parent
        within = given.parent.name == root.name and given.name.isdecimal()
        hint = f" Did you mean {given.parent.parent}@{given.name}?" if within else ""
        raise SetupError(
            f"There is no checkpoint in {root}. Give the --workdir of a training run, optionally "
            f"with @step.{hint}"
        )
    if step == BEST:
        return root / str(_best(root, there))
    if step is not None and step not in there:
        raise SetupError(f"{root} has no step {step}; it has {', '.join(map(str, there))}.")
    return root / str(there[-1] if step is None else step)


def _best(root: epath.Path, there: list[int]) -> int:
    metric = Checkpoint.read(root / str(there[-1])).config.checkpoint.keep_best
    best = Best(metric, root.parent).step(there) if metric else None
    if best is None:
        why = f"none of them was evaluated for {metric!r}" if metric else "keep_best is ''"
        raise SetupError(
            f"{root} does not tell which checkpoint is the best: {why}. Train with "
            f"--config.checkpoint.keep_best=<metric> and --config.eval.every=<steps>, or choose "
            f"one with @step; it has {', '.join(map(str, there))}."
        )
    return best


class Best:
    """Knows the checkpoint with the highest value of an evaluation's metric, if `metric` names one.

    What was measured before this process is read from metrics.jsonl.
    """

    def __init__(self, metric: str, workdir: epath.Path):
        self.metric, name, path = metric, f"eval/{metric}", workdir / "metrics.jsonl"
        lines = path.read_text().splitlines() if metric and path.exists() else []
        self.values = {x["step"]: x[name] for x in map(metrics.values, lines) if name in x}

    def measured(self, step: int, results: dict[str, float]) -> None:
        """Records the results of the evaluation after `step`.

        Raises:
          SetupError: the metric is not among it.
        """
        if not self.metric:
            return
        if self.metric not in results:
            raise SetupError(
                f"config.checkpoint.keep_best is {self.metric!r}, but the evaluation gives "
                f"{', '.join(results) or 'nothing'}. Name one of these, or leave it empty."
            )
        self.values[step] = results[self.metric]

    def step(self, among: list[int]) -> int | None:
        """The best of these steps, the newest of equals; None if none was evaluated."""
        # Of all metrics of an evaluation more is better: shares that are right, dB, codes in use.
        known = [(self.values[s], s) for s in among if math.isfinite(self.values.get(s, math.nan))]
        return max(known)[1] if known else None


@dataclass(frozen=True)
class Step(ocp.path.step.Metadata):
    """A checkpoint as orbax knows it."""

    @property
    def commit_timestamp(self) -> datetime.datetime:
        """The directory's; orbax would read it from a file that has no checksum."""
        return datetime.datetime.fromtimestamp(storage.stat(self.path).mtime, tz=datetime.UTC)


class Names(ocp.path.step.NameFormat):
    """A step's directory is named by its number and nothing else."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[Step]:
        """The committed ones."""
        for path in storage.children(epath.Path(base_path)):
            if STEP.fullmatch(path.name) and ocp.path.step.is_path_finalized(path):
                yield Step(step=int(path.name), path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> Step:
        """Raises ValueError, as orbax asks for, where there is none."""
        for candidate in self.find_all(base_path):
            if candidate.step == step:
                return candidate
        raise ValueError(f"{base_path} has no step {step}.")


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}
