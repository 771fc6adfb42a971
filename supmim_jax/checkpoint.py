"""Checkpoints: plain nested dicts of arrays, beside them the config and the data position.

Restoring is strict: paths, shapes and dtypes are compared with what is on disk, both ways, before
anything is read (orbax alone accepts a misspelt subtree or another depth).
"""

import json
import os
import re
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import serialization

from supmim_jax.config import CheckpointConfig, Config, SetupError
from supmim_jax.configdict import from_configdict, to_configdict
from supmim_jax.optim import path_name
from supmim_jax.types import TrainState

NAMES = ("state", "run", "config", "boxes")
# Numbers of a run that has not begun: examples read, seconds of training, records replaced.
BEGIN = {"position": 0, "seconds": 0.0, "broken_records": 0}
ANOTHER = (
    "Choose another step with @step; a training run goes on from the step before once this one's "
    "directory is removed."
)
UNREADABLE = f"{{}} is not a readable checkpoint: its `{{}}` is missing or incomplete. {ANOTHER}"


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints/<step>`; saving is asynchronous."""

    def __init__(self, workdir: str | os.PathLike, cfg: CheckpointConfig):
        self.directory = epath.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep, create=False)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.manager = ocp.CheckpointManager(self.directory, options=options, item_names=NAMES)

    def latest(self) -> int | None:
        """The newest complete step."""
        return self.manager.latest_step()

    def save(
        self, state: TrainState, cfg: Config, run: dict, boxes: np.ndarray | None = None
    ) -> None:
        """Starts to save the state.

        Args:
          state: on the devices.
          cfg: the run's config.
          run: plain numbers under the names of BEGIN.
          boxes: uint8 Nx4 that the images are cropped by, where there are any.
        """
        items = {
            "state": ocp.args.StandardSave(plain(state)),
            "run": ocp.args.JsonSave(run),
            "config": ocp.args.JsonSave(to_configdict(cfg).to_dict()),
        }
        if boxes is not None:
            items["boxes"] = ocp.args.StandardSave({"boxes": boxes})
        self.manager.save(int(state.step), args=ocp.args.Composite(**items))

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict]:
        """The state of `step`, laid out like the abstract `like`, and its `run` numbers.

        Raises:
          SetupError: the checkpoint holds other paths, shapes or dtypes.
        """
        directory = self.directory / str(step)
        target = plain(like)
        check_same(stored_tree(directory), target, directory)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(target), run=ocp.args.JsonRestore()
        )
        found = self.manager.restore(step, args=items)
        return serialization.from_state_dict(like, found["state"]), BEGIN | found["run"]

    def restore_boxes(self, step: int, cfg: Config) -> np.ndarray | None:
        """The boxes that the run crops by after `step`, uint8 Nx4; None before the first pass.

        Raises:
          SetupError: they are missing, or of another number of images.
        """
        if not cfg.steps_per_boxes or step < cfg.steps_per_boxes:
            return None
        directory = self.directory / str(step)
        like = {"boxes": np.zeros((cfg.data.train_examples, 4), np.uint8)}
        check_same(stored_tree(directory, "boxes"), like, directory)
        items = ocp.args.Composite(boxes=ocp.args.StandardRestore(like))
        return self.manager.restore(step, args=items)["boxes"]["boxes"]

    def close(self) -> None:
        """Waits for a save under way; raises what it raised."""
        self.manager.wait_until_finished()
        self.manager.close()


def plain(state: TrainState) -> dict:
    """The state as nested dicts with string keys, the optimizer's tuples too."""
    return serialization.to_state_dict(state)


def locate(checkpoint: str) -> epath.Path:
    """The directory of one step, from `workdir` or `workdir@step`.

    Raises:
      SetupError: there is no such workdir, checkpoint or step.
    """
    workdir, step = split_step(checkpoint)
    root = epath.Path(workdir).absolute() / "checkpoints"
    found = steps(workdir)
    if not found:
        raise SetupError(
            f"There is no checkpoint in {root}. Give the --workdir of a training run, optionally "
            f"with @step."
        )
    if step is not None and step not in found:
        raise SetupError(f"{root} has no step {step}; it has {', '.join(map(str, found))}.")
    return root / str(found[-1] if step is None else step)


def steps(workdir: str | os.PathLike) -> list[int]:
    """The complete checkpoints of a run, oldest first."""
    root = epath.Path(workdir).absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(root)) if root.exists() else []


def split_step(checkpoint: str) -> tuple[str, int | None]:
    """`workdir@step` as (workdir, step); other uses of @ belong to the path."""
    match = re.fullmatch(r"(.*)@(\d+)", checkpoint)
    return (match[1], int(match[2])) if match else (checkpoint, None)


def read_config(directory: epath.Path) -> Config:
    """The config of the run that wrote the checkpoint."""
    return from_configdict(_read_json(directory / "config" / "metadata"))


def read_run(directory: epath.Path) -> dict:
    """The `run` numbers that were saved with the state."""
    return BEGIN | _read_json(directory / "run" / "metadata")


def restore_params(directory: epath.Path, like: dict) -> dict:
    """The subtrees of `params` that the abstract `like` names (`encoder`, `head`).

    Raises:
      SetupError: as `check_params`, or a file of it is missing or broken.
    """
    check_params(directory, like)
    restorer = ocp.PyTreeCheckpointer()
    arguments = ocp.checkpoint_utils.construct_restore_args({"params": like})
    items = ocp.args.PyTreeRestore(
        item={"params": like}, restore_args=arguments, partial_restore=True
    )
    try:
        return restorer.restore(directory / "state", args=items)["params"]
    except Exception as error:  # orbax has no narrower one for files that are missing or cut off
        reason = str(error).partition(" See ")[0][:200]
        raise SetupError(f"{UNREADABLE.format(directory, 'state')} ({reason})") from None


def check_params(directory: epath.Path, like: dict) -> None:
    """Reads no array.

    Raises:
      SetupError: a subtree of `like` is missing or differs in paths, shapes or dtypes.
    """
    stored = stored_tree(directory).get("params", {})
    if missing := sorted(set(like) - set(stored)):
        raise SetupError(
            f"{directory} has no params/{', params/'.join(missing)}; it has "
            f"{', '.join('params/' + name for name in sorted(stored))}."
        )
    check_same({name: stored[name] for name in like}, like, directory)


def stored_tree(directory: epath.Path, item: str = "state") -> dict:
    """Shapes and dtypes of a saved item, without reading it."""
    metadata = ocp.PyTreeCheckpointer().metadata(directory / item).item_metadata
    if metadata is None:
        raise SetupError(UNREADABLE.format(directory, item))
    return dict(metadata.tree)


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


def _read_json(path: epath.Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise SetupError(
            f"{path} cannot be read ({type(error).__name__}): it is not whole. {ANOTHER}"
        ) from None
