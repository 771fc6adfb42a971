"""Shows what the masked branch does: python -m supmim_jax.picture --checkpoint runs/supmim.

A PNG with a column per image: the image, its tokens decoded, its masked twin, and its tokens with
the masked places filled by the decoder's predictions. Of a tokenizer's run: images and tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from jax.sharding import Mesh

from supmim_jax import checkpoint, commands, frozen, inference, metrics, program, sharding
from supmim_jax.config import Config, MeshConfig, SetupError
from supmim_jax.data import pipeline
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.supmim import SupMIM


@dataclass(frozen=True)
class Restored:
    """A checkpoint with its tokenizer; no `objective` where the tokenizer is what was trained."""

    cfg: Config
    tokenizer: inference.BoundTokenizer
    objective: SupMIM | None


def panels(restored: Restored, images_uint8, key: jax.Array) -> dict[str, np.ndarray]:
    """Rows of the picture by title, each float32 BxHxWxC in [-1, 1], for masks drawn from `key`."""
    tokenizer, objective = restored.tokenizer, restored.objective
    images, ids = pixels(images_uint8), tokenizer.encode(images_uint8)
    rows = {"image": images, "tokens": tokenizer.decode(ids)}
    if objective:
        patch, side = objective.encoder.cfg.patch, objective.encoder.side
        mask = objective.mask(key, jnp.arange(len(images)))
        grey = jnp.where(mask.masked[..., None], 0.0, patchify(images, patch))
        predicted = objective.predict_tokens(images, mask).argmax(-1).astype(ids.dtype)
        rows["masked"] = unpatchify(grey, patch, side)
        rows["predicted"] = tokenizer.decode(jnp.where(mask.masked, predicted, ids))
    return {title: np.clip(np.asarray(row), -1, 1) for title, row in rows.items()}


def restore(location: str) -> Restored:
    """The checkpoint at `workdir` or `workdir@step`, decoder and tokenizer included.

    Raises:
      SetupError: it is missing, or its objective has no image tokens.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    workdir, mesh = directory.parent.parent, one_device()
    if cfg.objective.name != "vqgan" and not cfg.has_tokens:
        raise SetupError(f"{location} is a {cfg.objective.name!r} run without image tokens.")
    tokens = inference.build_tokenizer(cfg, 1, mesh)
    if cfg.objective.name == "vqgan":
        params = checkpoint.restore_params(directory, {"tokenizer": tokens.arrays})
        return Restored(cfg, tokens.bind(params), None)
    arrays = sharding.put(frozen.tokenizer(cfg, workdir, tokens.arrays), tokens.arrays)
    prog = program.build(cfg, mesh)
    params = checkpoint.restore_params(directory, prog.state.params)
    fixed = {"target": {"tokenizer": arrays}} if prog.frozen else {}
    objective = nnx.merge(prog.graph, params, {}, fixed)
    return Restored(cfg, inference.BoundTokenizer(tokens, arrays), objective)


def one_device() -> Mesh:
    """A picture needs no more, whatever mesh the run had."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def draw(rows: dict[str, np.ndarray], path: Path) -> None:
    """Writes the panels as a PNG, an image a column."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = len(rows["image"])
    shape = (1.1 * count, 1.15 * len(rows))
    figure, axes = plt.subplots(len(rows), count, figsize=shape, squeeze=False)
    for i, (title, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            axes[i, j].imshow((image.squeeze() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
        axes[i, 0].set_ylabel(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main() -> None:
    restored = restore(CHECKPOINT.value)
    cfg = restored.cfg
    batch = next(pipeline.eval_dataset(cfg, cfg.data.eval_split, one_device()))
    images = batch.views[0][: COUNT.value]
    workdir, step = checkpoint.split_step(CHECKPOINT.value)
    path = Path(OUT.value or Path(workdir, "tokens.png"))
    draw(panels(restored, images, jax.random.key(cfg.seed)), path)
    if TENSORBOARD.value:
        metrics.write_image(Path(workdir), step or 0, "tokens", path)
    print(path)


if __name__ == "__main__":
    CHECKPOINT = flags.DEFINE_string("checkpoint", None, "workdir or workdir@step", required=True)
    OUT = flags.DEFINE_string("out", "", "PNG to write; default: <workdir>/tokens.png")
    COUNT = flags.DEFINE_integer("images", 8, "How many to show.", lower_bound=2)
    TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also an image for TensorBoard.")
    commands.start(main)
