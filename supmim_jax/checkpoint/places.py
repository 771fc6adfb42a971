"""Where the checkpoints of a run are: `workdir/checkpoints/<step>`."""

import dataclasses
import datetime
import re
from collections.abc import Iterator

import orbax.checkpoint as ocp
from etils import epath

from supmim_jax import storage
from supmim_jax.checkpoint import keeping, restoring
from supmim_jax.config import SetupError

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
    if checkpoint.endswith(EMA) and not restoring.read_config(directory).optim.ema:
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
    name = restoring.read_config(root / str(found[-1])).checkpoint.keep_best
    best = keeping.Best(name, root.parent).step(found) if name else None
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
