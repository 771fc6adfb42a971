"""Writes an encoder, and its classifier if it has one, for another library.

python -m supmim_jax.export --checkpoint runs/supmim --to transformers --out exported

The result is a directory with model.safetensors and config.json as timm and transformers load
them. What it computes from the same pixels is the same, in float32.
"""

import os

import jax
import numpy as np
from absl import flags

from supmim_jax import cli, encoder, sharding, storage, workdir
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.formats import files, timm, transformers

WRITERS = {"timm": timm.write, "transformers": transformers.write}
LOADING = {  # by library and by what the run's objective leaves; these are what can be written
    "timm": dict.fromkeys(
        ("classifier", "encoder"), "timm.create_model('local-dir:{}', pretrained=True)"
    ),
    "transformers": {
        "classifier": "transformers.AutoModelForImageClassification.from_pretrained('{}')",
        "encoder": "transformers.AutoModel.from_pretrained('{}', add_pooling_layer=False)",
    },
}


def export(location: str, to: str, out: str | os.PathLike) -> str:
    """Writes the checkpoint at `workdir` or `workdir@step` in the format `to`.

    Returns:
      How `out` is loaded there.

    Raises:
      SetupError: the checkpoint is missing or not of a classifier or an encoder by itself, or
        `out` is not free.
    """
    out = files.check_free(out)
    checkpoint = Checkpoint.open(location)
    cfg = checkpoint.config
    if cfg.objective.leaves not in LOADING[to]:
        raise SetupError(
            f"--checkpoint {location} is of objective {cfg.objective.name!r}, which leaves a "
            f"{cfg.objective.leaves}, neither a classifier of images nor an encoder by itself: "
            f"export the run that it started from, or another."
        )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    params = jax.tree.map(np.asarray, encoder.restore(checkpoint, mesh, 1).params)
    tensors, documents = WRITERS[to](params, cfg, workdir.class_names(checkpoint.workdir))
    files.write(out, tensors, documents)
    return LOADING[to][cfg.objective.leaves].format(out)


def main() -> None:
    print(export(CHECKPOINT.value, TO.value, OUT.value))


if __name__ == "__main__":
    CHECKPOINT = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    TO = flags.DEFINE_enum("to", None, sorted(WRITERS), "Library to write for.", required=True)
    OUT = storage.define("out", None, "Directory to make.", required=True, searched=False)
    cli.start(main)
