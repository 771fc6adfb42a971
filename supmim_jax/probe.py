"""Measures trained encoders: python -m supmim_jax.probe --checkpoint runs/supmim --split test.

Each encoder is rebuilt from the config saved beside its weights. Several checkpoints give a table
with a row each.
"""

from absl import flags

from supmim_jax import checkpoint, commands, evals, program, sharding

COLUMNS = ("encoder", "top-1 %", "kNN %", "epochs", "seconds")


def probe(location: str, split: str) -> tuple:
    """One row of the table: COLUMNS for the checkpoint at `workdir` or `workdir@step`.

    Raises:
      SetupError: the checkpoint is missing, or not that of its config.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    run = checkpoint.read_run(directory)
    mesh = sharding.make_mesh(cfg.mesh)
    inference = program.build_inference(cfg, cfg.eval.batch_size, mesh)
    encoder = program.BoundEncoder(
        inference, checkpoint.restore_encoder(directory, inference.params)
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
    print(table([probe(location, SPLIT.value) for location in CHECKPOINT.value]))


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_multi_string(
        "checkpoint", None, "workdir or workdir@step; may be given several times", required=True
    )
    SPLIT = flags.DEFINE_string("split", "", "Split to measure on; default: that of the run.")
    commands.start(main)
