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

from supmim_jax import cli, encoder, sharding, storage, tokenizers, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, MeshConfig
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.models.masking import Mask
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives import PREDICTORS


@dataclass(frozen=True)
class Restored:
    """A checkpoint with its tokenizer.

    No `objective` where the tokenizer is what was trained, no `tokenizer` where pixels are the
    target.
    """

    tokenizer: encoder.BoundTokenizer | None
    objective: nnx.Module | None  # one with `mask`, `predict` and `target`


def shows(cfg: Config) -> bool:
    """Whether a run has something to show: predictions, or a tokenizer of its own."""
    return cfg.objective.masks_patches or cfg.objective.leaves == "tokenizer"


def panels(restored: Restored, images_uint8, key: jax.Array) -> dict[str, np.ndarray]:
    """Rows of the picture by title, each float32 BxHxWxC in [-1, 1], for masks drawn from `key`."""
    tokenizer, objective = restored.tokenizer, restored.objective
    images = pixels(images_uint8)
    rows = {"image": images}
    if tokenizer:
        ids = tokenizer.encode(images_uint8)
        rows["tokens"] = tokenizer.decode(ids)
    if objective:
        mask = objective.mask(key, jnp.arange(len(images)))
        rows["masked"] = twin(objective, images, mask, jnp.zeros(()))
        predicted = objective.predict(images, mask)
        if tokenizer:
            likeliest = predicted.argmax(-1).astype(ids.dtype)
            rows["predicted"] = tokenizer.decode(jnp.where(mask.masked, likeliest, ids))
        else:
            patches = objective.target.restored(predicted, images)
            rows["reconstruction"] = twin(objective, images, mask, patches)
    return {title: np.clip(np.asarray(row), -1, 1) for title, row in rows.items()}


def twin(objective: nnx.Module, images, mask: Mask, patches_BxLxP) -> jax.Array:
    """Images with these patches in the masked places; 0 is grey."""
    patch, side = objective.encoder.cfg.patch, objective.encoder.side
    kept = patchify(images, patch)
    return unpatchify(jnp.where(mask.masked[..., None], patches_BxLxP, kept), patch, side)


def restore(checkpoint: Checkpoint) -> Restored:
    """What a checkpoint shows, decoder and tokenizer included.

    Raises:
      SetupError: its objective neither predicts patches nor trains a tokenizer.
    """
    cfg = checkpoint.config
    mesh, tokenizer = one_device(), None
    if not shows(cfg):
        raise SetupError(
            f"{checkpoint.directory} is of objective {cfg.objective.name!r}, which hides no "
            f"patches and trains no tokenizer: there is nothing to show. Give another --checkpoint."
        )
    if cfg.objective.leaves == "tokenizer":
        return Restored(encoder.restore(checkpoint, mesh, 1), None)
    if cfg.has_tokens:
        tokens = encoder.build_tokenizer(cfg, 1, mesh)
        dataset = Dataset.open(cfg) if cfg.tokens.cache else Dataset(cfg)
        arrays = tokenizers.open_tokenizer(cfg, dataset, checkpoint.workdir, tokens.arrays)
        tokenizer = tokens.bind({"tokenizer": sharding.put(arrays, tokens.arrays)})

    def split():
        with nnx.use_eager_sharding(False):
            predictor = PREDICTORS[cfg.objective.name](cfg, rngs=nnx.Rngs(0))
            return train_step.parts(predictor)

    graph, params, _, fixed = jax.eval_shape(split)
    params = checkpoint.restore_params(sharding.shard_like_params(params, mesh))
    if fixed:  # the step's own tokenizer, where no cache spares it from one
        fixed = {"target": {"tokenizer": tokenizer.arrays}}
    return Restored(tokenizer, nnx.merge(graph, params, fixed))


def one_device() -> Mesh:
    """A mesh of one device, which a picture needs, whatever mesh the run had."""
    return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def draw(rows: dict[str, np.ndarray]) -> bytes:
    """The panels as a PNG, one column per image."""
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
    checkpoint = Checkpoint.open(CHECKPOINT.value)
    restored, cfg = restore(checkpoint), checkpoint.config
    batch = next(Dataset(cfg).eval(cfg.data.eval_split, one_device()))
    images = batch.views[0][: COUNT.value]
    name = "tokens" if restored.tokenizer else "reconstruction"
    path = epath.Path(OUT.value or checkpoint.workdir / f"{name}.png")
    storage.write(path, draw(panels(restored, images, jax.random.key(cfg.seed))))
    print(path)


if __name__ == "__main__":
    CHECKPOINT = storage.define("checkpoint", None, "workdir or workdir@step", required=True)
    OUT = storage.define(
        "out", "", "PNG; default: in the workdir, named by what it shows", searched=False
    )
    COUNT = flags.DEFINE_integer("images", 8, "How many to show.", lower_bound=2)
    cli.start(main)
