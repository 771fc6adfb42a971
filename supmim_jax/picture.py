"""Shows what the masked branch does: python -m supmim_jax.picture --checkpoint runs/supmim.

A PNG with a row per image: the image, its masked twin, its tokens decoded, and the same with the
masked places filled by the decoder's predictions.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from supmim_jax import checkpoint, commands, program, sharding, tokenizers
from supmim_jax.config import Config, SetupError
from supmim_jax.data import pipeline
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.supmim import SupMIM

COLUMNS = ("image", "masked", "tokens", "predicted tokens")


def panels(objective: SupMIM, images_uint8, key: jax.Array) -> list[np.ndarray]:
    """The four columns, each float32 BxHxWxC in [-1, 1], for masks drawn from `key`."""
    images, patch, side = pixels(images_uint8), objective.encoder.cfg.patch, objective.encoder.side
    mask = objective.mask(key, jnp.arange(len(images)))
    ids = objective.tokenizer.encode(images)
    predicted = objective.predict_tokens(images, mask).argmax(-1)
    grey = jnp.where(mask.masked[..., None], 0.0, patchify(images, patch))
    filled = objective.tokenizer.decode(jnp.where(mask.masked, predicted, ids))
    columns = images, unpatchify(grey, patch, side), objective.tokenizer.decode(ids), filled
    return [np.clip(np.asarray(column), -1, 1) for column in columns]


def restore(location: str) -> tuple[Config, SupMIM]:
    """The config and the whole objective, decoder and tokenizer included, of a checkpoint.

    Raises:
      SetupError: the checkpoint is missing or its objective has no masked branch.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    if cfg.objective.name != "supmim":
        raise SetupError(f"{location} is a {cfg.objective.name!r} run; there are no masked tokens.")
    prog = program.build(cfg, sharding.make_mesh(cfg.mesh))
    params = checkpoint.restore_encoder(directory, prog.state.params)
    frozen = sharding.put(tokenizers.arrays(cfg, directory.parent.parent), prog.frozen)
    return cfg, nnx.merge(prog.graph, params, frozen)


def draw(columns: list[np.ndarray], path: Path) -> None:
    """Writes the panels as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = len(columns[0])
    figure, axes = plt.subplots(rows, len(columns), figsize=(1.3 * len(columns), 1.25 * rows))
    for j, (title, images) in enumerate(zip(COLUMNS, columns)):
        axes[0, j].set_title(title, fontsize=9)
        for i, image in enumerate(images):
            axes[i, j].imshow((image.squeeze() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            axes[i, j].axis("off")
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    cfg, objective = restore(CHECKPOINT.value)
    batch = next(pipeline.eval_dataset(cfg, cfg.data.eval_split, sharding.make_mesh(cfg.mesh)))
    images = np.asarray(batch.views[0])[: ROWS.value]
    path = Path(OUT.value or Path(CHECKPOINT.value.partition("@")[0]) / "tokens.png")
    draw(panels(objective, images, jax.random.key(cfg.seed)), path)
    print(path)


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or workdir@step", required=True)
    OUT = flags.DEFINE_string("out", "", "PNG to write; default: <workdir>/tokens.png")
    ROWS = flags.DEFINE_integer("rows", 8, "Images to show.", lower_bound=2)
    commands.start(main)
