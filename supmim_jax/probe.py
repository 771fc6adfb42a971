"""Measures trained encoders: python -m supmim_jax.probe --checkpoint runs/supmim --split test.

Each encoder is rebuilt from the config saved beside its weights. Several checkpoints give a table
with a row each.
"""

import dataclasses
import math

from absl import flags

from supmim_jax import checkpoint, commands, evals, program, sharding
from supmim_jax.config import MeshConfig

COLUMNS = ("encoder", "top-1 %", "kNN %", "epochs", "seconds")


def probe(location: str, split: str, data_dir: str = "") -> tuple:
    """One row of the table: COLUMNS for the checkpoint at `workdir` or `workdir@step`.

    It is measured on the devices that there are, whatever mesh it was trained on, and on the data
    in `data_dir` if that is given.

    Raises:
      SetupError: the checkpoint is missing, or not that of its config.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    run = checkpoint.read_run(directory)
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = math.ceil(cfg.eval.batch_size / mesh.size) * mesh.size
    cfg = dataclasses.replace(
        cfg,
        data=dataclasses.replace(cfg.data, data_dir=data_dir or cfg.data.data_dir),
        eval=dataclasses.replace(cfg.eval, batch_size=batch_size),
    )
    inference = program.build_inference(cfg, cfg.eval.batch_size, mesh)
    encoder = program.BoundEncoder(
        inference, checkpoint.restore_params(directory, inference.params)
    )
    found = evals.run_all(encoder, cfg, split or cfg.data.eval_split, mesh)
    epochs = run["position"] / cfg.data.train_examples
    name = cfg.objective.name
    return (
        name,
        f"{found['top1']:.2f}",
        f"{found['knn']:.2f}",
        f"{epochs:.0f}",
        f"{run['seconds']:.0f}",
    )


def table(rows: list[tuple]) -> str:
    """Rows under COLUMNS as a Markdown table, padded so that it also reads well on a terminal."""
    cells = [COLUMNS, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    rule = tuple("-" * w for w in widths)
    lines = (
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |"
        for row in (COLUMNS, rule, *rows)
    )
    return "\n".join(lines)


def main() -> None:
    print(table([probe(location, SPLIT.value, DATA_DIR.value) for location in CHECKPOINT.value]))


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_multi_string(
        "checkpoint", None, "workdir or workdir@step; may be given several times", required=True
    )
    SPLIT = flags.DEFINE_string("split", "", "Split to measure on; default: that of the run.")
    DATA_DIR = flags.DEFINE_string("data_dir", "", "Where the data are; default: as in the run.")
    commands.start(main)
