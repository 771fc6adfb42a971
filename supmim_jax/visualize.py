"""Shows what the masked branch does: python -m supmim_jax.visualize --checkpoint runs/supmim.

A PNG with a column per image: the image, its tokens decoded, its masked twin, and its tokens with
the masked places filled by the decoder's predictions. Where pixels are predicted (MAE, CMAE): the
image, its masked twin, and the same with the predicted patches in the masked places. Of a
tokenizer's run: images and tokens.
"""

import io
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from supmim_jax import checkpoint, cli, encoder, metrics, sharding, storage, tokenizers, train_step
from supmim_jax.config import Config, MeshConfig
from supmim_jax.data import loader
from supmim_jax.errors import SetupError
from supmim_jax.models.masking import Mask
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.mae import MAE
from supmim_jax.objectives.supmim import SupMIM

# What predicts masked patches. CMAE does as the MAE that it is built on: its encoder and decoder
# are all that is asked for, and its other tasks' heads and momentum branch stay on disk.
PREDICTORS = {"supmim": SupMIM, "mae": MAE, "cmae": MAE}


@dataclass(frozen=True)
class Restored:
    """A checkpoint with its tokenizer.

    No `objective` where the tokenizer is what was trained, no `tokenizer` where pixels are the
    target.
    """

    cfg: Config
    tokenizer: encoder.BoundTokenizer | None
    objective: SupMIM | MAE | None


def shows(cfg: Config) -> bool:
    """Whether there is something to see of a run: predictions, or a tokenizer of its own."""
    return cfg.objective.name in PREDICTORS or cfg.objective.leaves == "tokenizer"


def panels(restored: Restored, images_uint8, key: jax.Array) -> dict[str, np.ndarray]:
    """Rows of the picture by title, each float32 BxHxWxC in [-1, 1], for masks drawn from `key`."""
    images, mask = pixels(images_uint8), None
    if restored.objective:
        mask = restored.objective.mask(key, jnp.arange(len(images)))
    if restored.tokenizer:
        rows = token_rows(restored, images_uint8, mask)
    else:
        rows = pixel_rows(restored.objective, images, mask)
    return {title: np.clip(np.asarray(row), -1, 1) for title, row in rows.items()}


def token_rows(restored: Restored, images_uint8, mask: Mask | None) -> dict[str, jax.Array]:
    """Images, their tokens, and with a mask the masked twins and the likeliest tokens."""
    tokenizer, objective = restored.tokenizer, restored.objective
    images, ids = pixels(images_uint8), tokenizer.encode(images_uint8)
    rows = {"image": images, "tokens": tokenizer.decode(ids)}
    if mask is not None:
        predicted = objective.predict(images, mask).argmax(-1).astype(ids.dtype)
        rows["masked"] = twin(objective, images, mask, jnp.zeros(()))
        rows["predicted"] = tokenizer.decode(jnp.where(mask.masked, predicted, ids))
    return rows


def pixel_rows(objective: SupMIM | MAE, images, mask: Mask) -> dict[str, jax.Array]:
    """Images, their masked twins, and these with the predicted pixels in the masked places."""
    predicted = objective.target.restored(objective.predict(images, mask), images)
    return {
        "image": images,
        "masked": twin(objective, images, mask, jnp.zeros(())),
        "reconstruction": twin(objective, images, mask, predicted),
    }


def twin(objective: SupMIM | MAE, images, mask: Mask, patches_BxLxP) -> jax.Array:
    """Images with these patches in the masked places; 0 is grey."""
    patch, side = objective.encoder.cfg.patch, objective.encoder.side
    kept = patchify(images, patch)
    return unpatchify(jnp.where(mask.masked[..., None], patches_BxLxP, kept), patch, side)


def restore(location: str) -> Restored:
    """The checkpoint at `workdir` or `workdir@step`, decoder and tokenizer included.

    Raises:
      SetupError: it is missing, or its objective neither predicts patches nor trains a tokenizer.
    """
    directory = checkpoint.locate(location)
    cfg = checkpoint.read_config(directory)
    mesh, tokenizer = one_device(), None
    if not shows(cfg):
        raise SetupError(
            f"--checkpoint {location} is of objective {cfg.objective.name!r}, which hides no "
            f"patches and trains no tokenizer: give a run of "
            f"{', '.join(map(repr, PREDICTORS))} or 'vqgan'."
        )
    if cfg.objective.leaves == "tokenizer":
        tokens = encoder.build_tokenizer(cfg, 1, mesh)
        params = checkpoint.restore_params(directory, {"tokenizer": tokens.arrays})
        return Restored(cfg, tokens.bind(params), None)
    if cfg.has_tokens:
        tokens = encoder.build_tokenizer(cfg, 1, mesh)
        arrays = tokenizers.tokenizer(cfg, directory.parent.parent, tokens.arrays)
        tokenizer = tokens.bind({"tokenizer": sharding.put(arrays, tokens.arrays)})

    def split():
        with nnx.use_eager_sharding(False):
            return train_step.parts(PREDICTORS[cfg.objective.name](cfg, rngs=nnx.Rngs(0)))

    graph, params, _, fixed = jax.eval_shape(split)
    params = checkpoint.restore_params(directory, sharding.shard_like_params(params, mesh))
    if fixed:  # the step's own tokenizer, where no cache spares it from one
        fixed = {"target": {"tokenizer": tokenizer.arrays}}
    return Restored(cfg, tokenizer, nnx.merge(graph, params, fixed))


def one_device() -> Mesh:
    """A picture needs no more, whatever mesh the run had."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def draw(rows: dict[str, np.ndarray]) -> bytes:
    """The panels as a PNG, an image a column."""
    from matplotlib.figure import Figure

    count = len(rows["image"])
    shape = (1.1 * count, 1.15 * len(rows))
    figure = Figure(figsize=shape)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for i, (title, images) in enumerate(rows.items()):
        for j, image in enumerate(images):
            axes[i, j].imshow((image.squeeze() + 1) / 2, cmap="gray", vmin=0, vmax=1)
            axes[i, j].set_xticks([])
            axes[i, j].set_yticks([])
        axes[i, 0].set_ylabel(title, fontsize=9)
    figure.tight_layout(pad=0.3)
    file = io.BytesIO()
    figure.savefig(file, dpi=100)
    return file.getvalue()


def main() -> None:
    restored = restore(CHECKPOINT.value)
    cfg = restored.cfg
    batch = next(loader.eval_dataset(cfg, cfg.data.eval_split, one_device()))
    images = batch.views[0][: COUNT.value]
    workdir, _ = checkpoint.split_step(CHECKPOINT.value)
    name = "tokens" if restored.tokenizer else "reconstruction"
    path = epath.Path(OUT.value or f"{workdir}/{name}.png")
    png = draw(panels(restored, images, jax.random.key(cfg.seed)))
    storage.write(path, png)
    if TENSORBOARD.value:
        step = int(checkpoint.locate(CHECKPOINT.value).name)
        metrics.write_image(epath.Path(workdir), step, name, png)
    print(path)


if __name__ == "__main__":
    CHECKPOINT = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    OUT = storage.define(
        "out", "", "PNG; default: in the workdir, named by what it shows", searched=False
    )
    COUNT = flags.DEFINE_integer("images", 8, "How many to show.", lower_bound=2)
    TENSORBOARD = flags.DEFINE_bool("tensorboard", False, "Also an image for TensorBoard.")
    cli.start(main)
