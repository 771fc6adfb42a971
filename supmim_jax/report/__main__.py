"""Writes workdir/report.html: python -m supmim_jax.report --checkpoint runs/supmim --split test."""

import jax
from absl import flags
from etils import epath

from supmim_jax import cli, environment, storage
from supmim_jax.checkpoint import Checkpoint, locate
from supmim_jax.config import changed
from supmim_jax.errors import SetupError
from supmim_jax.report.measure import curves, environments, evaluations, measure
from supmim_jax.report.page import Report, render


def gather(location: str, split: str = "", data_dir: str = "") -> Report:
    """All that the page of the checkpoint at `workdir` or `workdir@step` shows.

    Its images are from `split` in `data_dir`; by default both are the run's.

    Raises:
      SetupError: the checkpoint, the data or a file of the workdir is missing or not of its form.
    """
    checkpoint = Checkpoint.open(location)
    workdir, cfg = checkpoint.workdir, checkpoint.config
    here = changed(cfg, data={"data_dir": data_dir or cfg.data.data_dir})
    split = split or cfg.data.eval_split
    return Report(
        name=workdir.name,
        cfg=cfg,
        step=checkpoint.step,
        run=checkpoint.run,
        split=split,
        curves=curves(workdir),
        evaluations=evaluations(workdir),
        trained_on=environments(workdir),
        made_on=environment.collect(jax.devices()),
        measured=measure(checkpoint, here, split),
    )


def write(location: str, split: str = "", data_dir: str = "", out: str = "") -> epath.Path:
    """Makes the page, by default workdir/report.html, and returns where it is.

    Raises:
      SetupError: as `gather`, or the page cannot be written.
    """
    path = epath.Path(out) if out else locate(location).parent.parent / "report.html"
    if storage.is_local(path) and not path.parent.is_dir():
        raise SetupError(f"--out {path} is in no directory: make {path.parent} first.")
    page = render(gather(location, split, data_dir))
    try:
        storage.write(path, page)  # all of it or none
    except OSError as error:
        raise SetupError(f"--out {path} cannot be written: {error}. Choose another.") from None
    return path


def main() -> None:
    print(write(CHECKPOINT.value, SPLIT.value, DATA_DIR.value, OUT.value))


if __name__ == "__main__":
    CHECKPOINT = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    SPLIT = flags.DEFINE_string("split", "", "Split to show images of; default: that of the run.")
    DATA_DIR = storage.define("data_dir", "", "Where the data are; default: as in the run.")
    OUT = storage.define("out", "", "HTML to write; default: <workdir>/report.html", searched=False)
    cli.start(main)
