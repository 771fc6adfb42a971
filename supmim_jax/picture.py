"""Shows what the masked branch does: python -m supmim_jax.picture --checkpoint runs/supmim.

A PNG with a column per image: the image, its masked twin, its tokens decoded, and the same with
the masked places filled by the decoder's predictions.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from supmim_jax import checkpoint, commands, program, sharding, tokenizers
from supmim_jax.config import Config, MeshConfig, SetupError
from supmim_jax.data import pipeline
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.supmim import SupMIM

ROWS = ("image", "masked", "tokens", "predicted")


def panels(objective: SupMIM, images_uint8, key: jax.Array) -> list[np.ndarray]:
    """The four rows, each float32 BxHxWxC in [-1, 1], for masks drawn from `key`."""
    images, patch, side = pixels(images_uint8), objective.encoder.cfg.patch, objective.encoder.side
    mask = objective.mask(key, jnp.arange(len(images)))
    ids = objective.tokenizer.encode(images)
    predicted = objective.predict_tokens(images, mask).argmax(-1)
    grey = jnp.where(mask.masked[..., None], 0.0, patchify(images, patch))
    filled = objective.tokenizer.decode(jnp.where(mask.masked, predicted, ids))
    rows = images, unpatchify(grey, patch, side), objective.tokenizer.decode(ids), filled
    return [np.clip(np.asarray(row), -1, 1) for row in rows]


def restore(location: str) -> tuple[Config, SupMIM]:
    """The config and the whole objective, decoder and tokenizer included, of a checkpoint.

    Raises:
      SetupError: the checkpoint is missing or its objective has no masked branch.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    if cfg.objective.name != "supmim":
        raise SetupError(f"{location} is a {cfg.objective.name!r} run; there are no masked tokens.")
    prog = program.build(cfg, one_device())
    params = checkpoint.restore_params(directory, prog.state.params)
    frozen = sharding.put(tokenizers.arrays(cfg, directory.parent.parent), prog.frozen)
    return cfg, nnx.merge(prog.graph, params, frozen)


def one_device() -> Mesh:
    """A picture needs no more, whatever mesh the run had."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def draw(rows: list[np.ndarray], path: Path) -> None:
    """Writes the panels as a PNG, an image a column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(rows[0])
    figure, axes = plt.subplots(len(rows), count, figsize=(1.1 * count, 1.15 * len(rows)))
    for i, (title, images) in enumerate(zip(ROWS, rows)):
        for j, image in enumerate(images):
            axes[i, j].imshow((image.squeeze() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
        axes[i, 0].set_ylabel(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    cfg, objective = restore(CHECKPOINT.value)
    batch = next(pipeline.eval_dataset(cfg, cfg.data.eval_split, one_device()))
    images = np.asarray(batch.views[0])[: COUNT.value]
    path = Path(OUT.value or Path(checkpoint.split_step(CHECKPOINT.value)[0], "tokens.png"))
    draw(panels(objective, images, jax.random.key(cfg.seed)), path)
    print(path)


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or workdir@step", required=True)
    OUT = flags.DEFINE_string("out", "", "PNG to write; default: <workdir>/tokens.png")
    COUNT = flags.DEFINE_integer("images", 8, "How many to show.", lower_bound=2)
    commands.start(main)
