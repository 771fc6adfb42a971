"""Reading checkpoints.

Restoring is strict: the files are those that were saved (`damage`), and paths, shapes and dtypes
are compared with what is on disk, both ways, before anything is read (orbax alone accepts a
misspelt subtree or another depth).


Where the checkpoints of a run are: `workdir/checkpoints/<step>`."""

import contextlib
import dataclasses
import datetime
import json
import re
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from supmim_jax import storage
from supmim_jax.batch import TrainState
from supmim_jax.checkpoint import retention
from supmim_jax.checkpoint.checksums import ANOTHER, verify
from supmim_jax.config import Config
from supmim_jax.config.configdict import from_configdict
from supmim_jax.errors import SetupError
from supmim_jax.sharding import path_name

BEST, EMA = "best", "@ema"
STEP = re.compile(r"0|[1-9]\d*")
TEMPORARY = ".orbax-checkpoint-tmp"


def locate(checkpoint: str) -> epath.Path:
    """The directory of one step, from `workdir`, `workdir@step` or `workdir@best`.

    With `@ema` behind it, the run must have a moving average of its parameters; where it has one,
    that is what is taken with or without it.

    Raises:
      SetupError: there is no such workdir, checkpoint, step or average, or none is known to be the
        best.
    """
    directory = _located(checkpoint)
    if checkpoint.endswith(EMA) and not read_config(directory).optim.ema:
        raise SetupError(
            f"{checkpoint}: that run has no moving average of its parameters (config.optim.ema is "
            f"0). Leave out {EMA}, or train with --config.optim.ema=0.9999."
        )
    return directory


def _located(checkpoint: str) -> epath.Path:
    workdir, step = split_step(checkpoint)
    root = storage.location(workdir) / "checkpoints"
    found = steps(workdir)
    if not found:
        raise SetupError(
            f"There is no checkpoint in {root}. Give the --workdir of a training run, optionally "
            f"with @step."
        )
    if step == BEST:
        return root / str(_best(root, found))
    if step is not None and step not in found:
        raise SetupError(f"{root} has no step {step}; it has {', '.join(map(str, found))}.")
    return root / str(found[-1] if step is None else step)


def steps(workdir: str | epath.Path) -> list[int]:
    """The complete checkpoints of a run, oldest first; not what was set aside or never finished."""
    return sorted(x.step for x in Names().find_all(storage.location(workdir) / "checkpoints"))


def unfinished(directory: epath.Path) -> list[epath.Path]:
    """What saves that were killed have left."""
    complete = {x.path.name for x in Names().find_all(directory)}
    return [
        path
        for path in storage.children(directory)
        if TEMPORARY in path.name or (STEP.fullmatch(path.name) and path.name not in complete)
    ]


def split_step(checkpoint: str) -> tuple[str, int | str | None]:
    """`workdir@step[@ema]` as (workdir, step), where step may be "best"; other @ are the path's."""
    checkpoint = checkpoint.removesuffix(EMA)
    match = re.fullmatch(rf"(.*)@(\d+|{BEST})", checkpoint)
    if match is None:
        return checkpoint, None
    return match[1], match[2] if match[2] == BEST else int(match[2])


def _best(root: epath.Path, found: list[int]) -> int:
    name = read_config(root / str(found[-1])).checkpoint.keep_best
    best = retention.Best(name, root.parent).step(found) if name else None
    if best is None:
        why = f"none of them was evaluated for {name!r}" if name else "checkpoint.keep_best is ''"
        raise SetupError(
            f"{root} does not tell which checkpoint is the best: {why}. Train with "
            f"--config.checkpoint.keep_best=<metric> and --config.eval.every=<steps>, or choose "
            f"one with @step; it has {', '.join(map(str, found))}."
        )
    return best


@dataclasses.dataclass(frozen=True)
class Step(ocp.path.step.Metadata):
    """A checkpoint as orbax knows it."""

    @property
    def commit_timestamp(self) -> datetime.datetime:
        """That of the directory: orbax would read it from a file that the sums leave out."""
        return datetime.datetime.fromtimestamp(self.path.stat().mtime, tz=datetime.UTC)


class Names(ocp.path.step.NameFormat):
    """A step's directory has its number as its name, and nothing more."""

    def build_name(self, step: int) -> str:
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[Step]:
        """The committed ones."""
        for path in storage.children(epath.Path(base_path)):
            if STEP.fullmatch(path.name) and ocp.path.step.is_path_finalized(path):
                yield Step(step=int(path.name), path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> Step:
        """Raises ValueError, as orbax asks for, where there is none."""
        for found in self.find_all(base_path):
            if found.step == step:
                return found
        raise ValueError(f"{base_path} has no step {step}.")


# Numbers of a run that has not begun.
BEGIN = {
    "position": 0,  # examples of the training sequence that lie behind it
    "seconds": 0.0,  # of training
    "broken_records": 0,  # that others stood in for
    "skipped_batches": 0,  # of the sequence, left out after NaN
    "roll_backs": 0,
}


def plain(state: TrainState) -> dict:
    """The state as nested dicts with string keys, the optimizer's tuples too."""
    found = serialization.to_state_dict(state)
    if not found["ema"]:  # as in the checkpoints from before there were any
        del found["ema"]
    return found


def read_config(directory: epath.Path) -> Config:
    """The config of the run that wrote the checkpoint."""
    verify(directory)
    return from_configdict(_read_json(directory / "config" / "metadata"))


def read_run(directory: epath.Path) -> dict:
    """The `run` numbers that were saved with the state."""
    verify(directory)
    return BEGIN | _read_json(directory / "run" / "metadata")


def restore_item(directory: epath.Path, item: str, like: Any) -> Any:
    """A saved tree of arrays, laid out like the abstract `like`, which is all of it.

    Raises:
      SetupError: the checkpoint is damaged, or holds other paths, shapes or dtypes.
    """
    check_same(stored_tree(directory, item), like, directory)
    restorer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    with _readable(directory, item):
        return restorer.restore(directory / item, args=ocp.args.StandardRestore(like))


def restore_params(directory: epath.Path, like: dict) -> dict:
    """The subtrees of the parameters that the abstract `like` names (`encoder`, `head`).

    Of a run with config.optim.ema they are those of the moving average.

    Raises:
      SetupError: as `check_params`.
    """
    name = check_params(directory, like)
    restorer = ocp.PyTreeCheckpointer()
    arguments = ocp.checkpoint_utils.construct_restore_args({name: like})
    items = ocp.args.PyTreeRestore(item={name: like}, restore_args=arguments, partial_restore=True)
    with _readable(directory, "state"):
        return restorer.restore(directory / "state", args=items)[name]


def check_params(directory: epath.Path, like: dict) -> str:
    """Where the parameters are that `restore_params` takes: `ema` or `params`; restores no array.

    Raises:
      SetupError: the checkpoint is damaged, or a subtree of `like` is missing or differs in paths,
        shapes or dtypes.
    """
    tree = stored_tree(directory)
    where = "ema" if tree.get("ema") else "params"
    stored = tree.get(where, {})
    if missing := sorted(set(like) - set(stored)):
        raise SetupError(
            f"{directory} has no {where}/{f', {where}/'.join(missing)}; it has "
            f"{', '.join(f'{where}/{name}' for name in sorted(stored))}."
        )
    check_same({name: stored[name] for name in like}, like, directory)
    return where


def stored_tree(directory: epath.Path, item: str = "state") -> dict:
    """Shapes and dtypes of a saved item, without restoring it."""
    verify(directory)
    with _readable(directory, item):
        return dict(ocp.PyTreeCheckpointer().metadata(directory / item).item_metadata.tree)


def check_same(stored: Any, wanted: Any, directory: epath.Path) -> None:
    """Raises SetupError, naming paths, unless both trees have the same arrays."""
    on_disk, asked = _shapes(stored), _shapes(wanted)
    problems = [f"{p} {s} is not in the checkpoint" for p, s in asked.items() if p not in on_disk]
    problems += [f"{p} {s} is only in the checkpoint" for p, s in on_disk.items() if p not in asked]
    problems += [
        f"{p} is {on_disk[p]} in the checkpoint, {s} in the model"
        for p, s in asked.items()
        if p in on_disk and on_disk[p] != s
    ]
    if problems:
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise SetupError(
            f"{directory} is of another architecture or optimizer: {'; '.join(problems[:5])}{more}."
            f" Use the config that is saved beside it, or another --workdir."
        )


def _shapes(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {path_name(p): f"{x.dtype}{list(x.shape)}" for p, x in leaves}


@contextlib.contextmanager
def _readable(directory: epath.Path, item: str) -> Iterator[None]:
    """The files are those that were saved; still, the disk may fail, or they be of no use."""
    try:
        yield
    except jax.errors.JaxRuntimeError:  # memory, or another process
        raise
    except Exception as error:  # orbax has no narrower one
        reason = str(error).partition(" See ")[0][:200]
        raise SetupError(
            f"{directory} is not a readable checkpoint: its `{item}` is missing or incomplete "
            f"({type(error).__name__}: {reason}). {ANOTHER}"
        ) from None


def _read_json(path: epath.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SetupError(
            f"{path} cannot be read ({type(error).__name__}): it is not whole. {ANOTHER}"
        ) from None
