"""Measures trained encoders: python -m supmim_jax.probe --checkpoint runs/supmim --split test.

Each encoder is rebuilt from the config saved beside its weights. --config configs/probes/<name>.py
says what to measure, and on which data; without it, it is what the run itself was judged by.
Several checkpoints give a table with a row each.
"""

import re
import sys
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import flax
import jax
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from supmim_jax import cli, encoder, evals, multihost, sharding, storage
from supmim_jax.batch import Encoder, Features
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, DataConfig, ProbeConfig, changed
from supmim_jax.config.configdict import from_configdict, section, to_configdict
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals.features import Results

TITLES = {"top1": "top-1 %", "knn": "kNN %", "miou": "mIoU %"}  # others keep their names
SWEEP = "knn/k="  # metrics that would make the table too wide; the file has them


@dataclass(frozen=True)
class Report:
    """One checkpoint, measured."""

    checkpoint: Checkpoint
    asked: ProbeConfig
    data: DataConfig  # that it was measured on
    mesh: Mesh
    results: Results

    def row(self) -> dict[str, str]:
        """A line of the table, by its columns."""
        metrics = {
            TITLES.get(name, name): f"{value:.2f}"
            for name, value in self.results.metrics.items()
            if not name.startswith(SWEEP)
        }
        seconds = f"{self.checkpoint.run['seconds']:.0f}"
        place = f"{self.checkpoint.workdir.name}@{self.checkpoint.step}"
        first = {"checkpoint": place, "encoder": self.checkpoint.config.objective.name}
        return first | metrics | {"epochs": f"{self.checkpoint.epochs:.0f}", "seconds": seconds}

    def left_out(self) -> list[str]:
        """What was asked of heads that the run does not have, or that know other classes."""
        done = {*self.results.metrics, *self.results.errors}
        if self.checkpoint.config.objective.leaves == "tokenizer":
            return []
        return [x for x in ("top1", "miou") if x in self.asked.eval.which and x not in done]

    def document(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        device = self.mesh.devices.flat[0]
        return {
            "checkpoint": str(self.checkpoint.directory),
            "objective": self.checkpoint.config.objective.name,
            "step": self.checkpoint.step,
            "epochs": self.checkpoint.epochs,
            "seconds": self.checkpoint.run["seconds"],
            "metrics": self.results.metrics,
            "details": self.results.details,
            **({evals.ERRORS: errors} if (errors := self.results.errors) else {}),
            "config": to_configdict(self.asked).to_dict(),
            "data": section(self.data),
            "device": {
                "platform": device.platform,
                "kind": device.device_kind,
                "mesh": dict(self.mesh.shape),
            },
            "versions": {m.__name__: m.__version__ for m in (jax, flax, np)},
        }


@dataclass(frozen=True)
class WithoutHeads:
    """An encoder with heads of other classes than the data that it is measured on."""

    encoder: Encoder
    hidden: tuple[str, ...]  # fields of Features

    def features(self, images: jax.Array) -> Features:
        return self.encoder.features(images)._replace(**dict.fromkeys(self.hidden))


def probe(
    checkpoint: Checkpoint,
    asked: ProbeConfig | None = None,
    devices: list[jax.Device] | None = None,
) -> Report:
    """Measures a checkpoint, whatever mesh it was trained on.

    Args:
      checkpoint: of any run.
      asked: what to measure; default: what the run itself was judged by.
      devices: what to measure on; default: all that there are.

    Raises:
      SetupError: the checkpoint is not that of its config, or the data are missing.
    """
    run = checkpoint.config
    asked = asked or own(run)
    mesh = sharding.make_mesh(asked.mesh, devices)
    dataset = open_data(run, asked, mesh)
    data = dataset.cfg.data
    model = encoder.restore(checkpoint, mesh, dataset.cfg.eval.batch_size)
    hidden = unknown_heads(run.data, data)
    if hidden and run.objective.leaves != "tokenizer":
        model = WithoutHeads(model, hidden)
    results = evals.run_all(model, dataset, data.eval_split, mesh)
    return Report(checkpoint, asked, data, mesh, results)


def open_data(run: Config, asked: ProbeConfig, mesh: Mesh) -> Dataset:
    """What a checkpoint of `run` is measured on; its config has the evaluations that are asked for.

    Raises:
      SetupError: the data are missing, or cannot be evaluated as asked.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    batch_size = -(-asked.eval.batch_size // shards) * shards
    cfg = changed(
        run,
        data=asked.data.over(run.data),
        eval=changed(asked.eval, batch_size=batch_size),
        # Which checkpoints stayed was the run's affair; here nothing is evaluated while training.
        checkpoint={"keep_best": ""},
    )
    dataset = Dataset(cfg)
    evals.check(dataset, cfg.data.eval_split)
    return dataset


def unknown_heads(run: DataConfig, data: DataConfig) -> tuple[str, ...]:
    """The outputs of the run's heads that say nothing about classes of `data`."""
    classes = {
        "logits": lambda cfg: (cfg.name, cfg.label_field, cfg.num_classes),
        "masks": lambda cfg: (cfg.name, cfg.masks),
    }
    return tuple(output for output, of in classes.items() if of(run) != of(data))


def own(run: Config) -> ProbeConfig:
    """The probe that repeats the evaluation at the end of a run."""
    return ProbeConfig(eval=changed(run.eval, every=0))


def table(rows: list[dict[str, str]]) -> str:
    """A Markdown table, padded so that it also reads well on a terminal."""
    last = ("epochs", "seconds")
    columns = [*dict.fromkeys(c for row in rows for c in row if c not in last), *last]
    cells = [columns, *([row.get(c, "") for c in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    rule = ["-" * w for w in widths]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (columns, rule, *cells[1:])
    )


def save(report: Report, name: str) -> epath.Path:
    """Writes <workdir>/evals/<name>-<step>.json, whole or not at all; raises OSError."""
    path = report.checkpoint.workdir / "evals" / f"{name}-{report.checkpoint.step}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_json(path, report.document())
    return path


def with_flags(asked: ProbeConfig) -> ProbeConfig:
    """`asked` with --split and --data_dir, where they are given."""
    given = {"eval_split": SPLIT.value, "data_dir": DATA_DIR.value}
    return changed(asked, data={name: value for name, value in given.items() if value})


def file_name() -> str:
    """The config's name, of which its argument and --split are a part; `run` without a config."""
    filename = flags.FLAGS["config"].config_filename if CONFIG.value else "run"
    path, _, argument = filename.partition(":")
    parts = (PurePath(path).stem, argument, SPLIT.value)
    return re.sub(r"[^\w.-]+", "_", "-".join(filter(None, parts)))


def main() -> None:
    asked = from_configdict(CONFIG.value, ProbeConfig) if CONFIG.value is not None else None
    rows, refused = [], []
    for location in CHECKPOINT.value:
        try:
            checkpoint = Checkpoint.open(location)
            report = probe(checkpoint, with_flags(asked or own(checkpoint.config)))
        except SetupError as error:  # of one checkpoint; the others are measured
            refused.append(str(error))
            continue
        rows.append(report.row())
        if names := report.left_out():
            said = (
                f"{location}: left out: {', '.join(names)}. The run has no head for these classes."
            )
            if report.results.metrics:  # no error: the others were asked for, too
                print(said, file=sys.stderr)
            else:
                refused.append(f"{said} Ask for others: knn, linear, few_shot or segmentation.")
        if report.results.errors:
            refused.append(evals.told(report.results.errors, location))
        try:
            print(save(report, file_name()), file=sys.stderr)
        except OSError as error:  # of a checkpoint that others own; the table has the numbers
            print(f"Not saved: {error}", file=sys.stderr)
    if rows:
        print(table(rows))
    if refused:
        cli.fail("\n\n".join(refused), multihost.EXIT_SETUP)


if __name__ == "__main__":
    CONFIG = cli.define("What to measure: configs/probes/*.py")
    CHECKPOINT = storage.define_multi(
        "checkpoint", "workdir or workdir@step; may be given several times"
    )
    SPLIT = flags.DEFINE_string("split", "", "Split to measure on; default: as configured.")
    DATA_DIR = storage.define("data_dir", "", "Where the data are; default: as configured.")
    cli.start(main)
