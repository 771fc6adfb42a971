"""Writes an encoder and its classifier for another library.

python -m supmim_jax.export --checkpoint runs/supmim --to transformers --out exported

The result is a directory with model.safetensors and config.json as timm and transformers load
them. What it computes from the same pixels is the same, in float32.
"""

from pathlib import Path

import jax
import numpy as np
from absl import flags

from supmim_jax import checkpoint, commands, inference, sharding
from supmim_jax.config import MeshConfig, SetupError
from supmim_jax.formats import files, timm_vit, transformers_vit

WRITERS = {"timm": timm_vit.write, "transformers": transformers_vit.write}
LOADING = {
    "timm": "timm.create_model('local-dir:{}', pretrained=True)",
    "transformers": "transformers.AutoModelForImageClassification.from_pretrained('{}')",
}


def export(location: str, to: str, out: Path) -> None:
    """Writes the checkpoint at `workdir` or `workdir@step` in the format `to`.

    Raises:
      SetupError: the checkpoint is missing or has no classifier, or `out` is not free.
    """
    files.check_free(out)
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    if cfg.objective.name not in ("supervised", "supmim"):
        raise SetupError(
            f"--checkpoint {location} is of objective {cfg.objective.name!r}, which trains no "
            f"classifier of images: export the run that it started from, or another."
        )
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    runner = inference.build_inference(cfg, 1, mesh)
    params = jax.tree.map(np.asarray, checkpoint.restore_params(directory, runner.params))
    tensors, documents = WRITERS[to](params, cfg)
    files.write(out, tensors, documents)


def main() -> None:
    export(CHECKPOINT.value, TO.value, Path(OUT.value))
    print(LOADING[TO.value].format(OUT.value))


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or workdir@step", required=True)
    TO = flags.DEFINE_enum("to", None, sorted(WRITERS), "Library to write for.", required=True)
    OUT = flags.DEFINE_string("out", None, "Directory to make.", required=True)
    commands.start(main)
