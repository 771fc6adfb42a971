"""What a checkpoint makes of images: the arrays that the page shows."""

import dataclasses
import math
from typing import NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from supmim_jax import checkpoint, picture, program, sharding
from supmim_jax.config import Config, MeshConfig
from supmim_jax.data import pipeline, records, transforms
from supmim_jax.evals import features, knn
from supmim_jax.types import Features

SHOWN = 8  # images of the split, its first, so that nobody can have chosen them
NEIGHBOURS = 6  # per image
Panels = dict[str, np.ndarray]  # uint8 images BxHxWxC by the name of the row


class Examples(NamedTuple):
    """Images of the split as evaluation sees them."""

    images: np.ndarray  # uint8 BxHxWxC
    labels: np.ndarray  # int32 B


class Neighbourhood(NamedTuple):
    """The nearest training images of each example, the nearest first."""

    images: np.ndarray  # uint8 BxKxHxWxC
    labels: np.ndarray  # int32 BxK
    similarity: np.ndarray  # float32 BxK, cosine


class Segmented(NamedTuple):
    """Examples whose pixels have classes; 0 is the ground."""

    images: np.ndarray  # uint8 BxHxWxC
    masks: np.ndarray  # int BxHxW
    predictions: np.ndarray  # int BxHxW
    classes: list[str]  # of pixels
    ignore: int  # in masks: no class is known


class Measured(NamedTuple):
    classes: list[str]
    examples: Examples
    neighbours: Neighbourhood | None = None  # of runs with an encoder, and so are the tokens
    tokens: np.ndarray | None = None  # float32 BxHxWxD of the examples
    panels: Panels | None = None  # of runs with image tokens
    segmented: Segmented | None = None  # of data sets with masks


def measure(location: str, cfg: Config, split: str) -> Measured:
    """Everything for the page from the checkpoint at `location`, on the devices that there are.

    Args:
      location: workdir or workdir@step.
      cfg: the config beside it, with the data directory of this machine.
      split: where the examples are from.

    Raises:
      SetupError: the checkpoint, its tokenizer or the data set don't fit together.
    """
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = math.ceil(cfg.eval.batch_size / mesh.size) * mesh.size
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=batch_size))
    batch = next(pipeline.eval_dataset(cfg, split, mesh))
    images, labels, weight = features.on_host((batch.views[0], batch.label, batch.weight))
    shown = Examples(*(x[weight > 0][:SHOWN] for x in (images, labels)))
    found = Measured(class_names(cfg, split), shown)
    if cfg.objective.name != "vqgan":
        encoder = restored(checkpoint.locate(location), cfg, mesh)
        of_batch = Features(*features.on_host(encoder.features(batch.views[0])))
        found = found._replace(
            tokens=of_batch.tokens[: len(shown.images)],
            neighbours=neighbourhood(encoder, of_batch.pooled[: len(shown.images)], cfg, mesh),
        )
    if cfg.has_tokens or cfg.objective.name == "vqgan":
        found = found._replace(panels=panels(location, shown.images, cfg.seed))
    return found


def class_names(cfg: Config, split: str) -> list[str]:
    """Those of the data set; a class that is only a number is called "class 7"."""
    names = records.open_source(cfg.data, split).features["label"].names
    return [f"class {name}" if name.isdecimal() else name for name in names]


def restored(directory: epath.Path, cfg: Config, mesh: Mesh) -> program.BoundEncoder:
    inference = program.build_inference(cfg, cfg.eval.batch_size, mesh)
    return program.BoundEncoder(inference, checkpoint.restore_params(directory, inference.params))


def neighbourhood(
    encoder: program.BoundEncoder, queries_BxD: np.ndarray, cfg: Config, mesh: Mesh
) -> Neighbourhood:
    """The nearest images of the training split, exactly."""
    bank = features.extract(encoder, pipeline.eval_dataset(cfg, cfg.data.train_split, mesh))
    nearest = min(NEIGHBOURS, len(bank.label))
    similarity, index = knn.neighbours(queries_BxD, bank.pooled, nearest, mesh=mesh)
    source = records.open_source(cfg.data, cfg.data.train_split)
    make = transforms.EvalExample(cfg.data)
    images = np.stack([[make((int(i), source[i]))["image"] for i in row] for row in index])
    return Neighbourhood(images, bank.label[index], similarity)


def panels(location: str, images_uint8: np.ndarray, seed: int) -> Panels:
    """Images, their tokens decoded, masked twins and predictions, as `picture` has them."""
    restored = picture.restore(location)
    rows = picture.panels(restored, jax.numpy.asarray(images_uint8), jax.random.key(seed))
    return {title: np.round((row + 1) * 127.5).astype(np.uint8) for title, row in rows.items()}
