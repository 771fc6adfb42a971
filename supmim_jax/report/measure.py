"""What a report shows: the run's own files, and what its checkpoint makes of images."""

import json
import math
import sys
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from supmim_jax import encoder as encoder_module
from supmim_jax import environment, sharding, storage, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, MeshConfig, changed
from supmim_jax.data import transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import ERRORS, evaluate, features, knn
from supmim_jax.evals import segmentation as segmentation_module

# --- the files of a workdir as plain values; SetupError if the form of one is wrong

CURE = "Repair it, or move it away."
LARGEST_INT = 2**53  # that a float holds
LARGEST_DRAWN = 1e100
# Of results.json; the rest was measured.
ABOUT = ("objective", "epochs", "seconds", "split", ERRORS)


class Evaluation(NamedTuple):
    """Numbers from one file."""

    source: str  # the file's name
    about: str  # the split and the like, as far as the file tells
    metrics: dict[str, float]


def curves(workdir: epath.Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by name, from metrics.jsonl; {} where there is none.

    A line is {"step": s, name: value}; the last one may have been cut.
    """
    path = workdir / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:
        raise _refused(path, str(error)) from None
    found: dict[str, list[tuple[int, float]]] = {}
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            step = values.pop("step")
            if not (_is_numbers(values) and type(step) is int and 0 <= step < LARGEST_INT):
                raise ValueError
        except (ValueError, LookupError, AttributeError, TypeError, RecursionError):
            if number == len(lines):
                break
            raise _refused(path, f"line {number} is no object of numbers with a step") from None
        for name, value in values.items():
            if abs(value) < LARGEST_DRAWN:  # and so no NaN
                found.setdefault(name, []).append((step, value))
    return found


def evaluations(workdir: epath.Path) -> list[Evaluation]:
    """Everything that was measured: results.json, then evals/*.json by name, where there."""
    results, evals = workdir / "results.json", workdir / "evals"
    paths = [results] if results.exists() else []
    paths += sorted(evals.glob("*.json")) if evals.exists() else []
    found = []
    for path in paths:
        values = storage.read_json(path, CURE)
        if not isinstance(values, dict):
            raise _refused(path, "it is no object")
        if path == results:
            source, about = path.name, ["end of training", _told(values, "split", "split ")]
            metrics = {name: value for name, value in values.items() if name not in ABOUT}
        else:
            source, data, metrics = f"evals/{path.name}", values.get("data"), values.get("metrics")
            about = [_told(values, "step", "step "), _told(data, "name")]
            about.append(_told(data, "eval_split", "split "))
        if not isinstance(metrics, dict) or not _is_numbers(metrics):
            raise _refused(path, "its metrics are no object of numbers")
        found.append(Evaluation(source, ", ".join(filter(None, about)), metrics))
    return found


def environments(workdir: epath.Path) -> list[dict]:
    """What the run was trained on, a dict per part; [] for runs that did not note it."""
    path = workdir / "environment.json"
    parts = storage.read_json(path, CURE) if path.exists() else []
    plain = (str, int, bool, type(None))
    if not isinstance(parts, list) or not all(
        isinstance(part, dict)
        and environment.FROM_STEP in part
        and all(type(x) in plain for x in part.values())
        for part in parts
    ):
        reason = "it is no list of objects of texts and numbers, each with its from_step"
        raise _refused(path, reason)
    return parts


def _told(values: Any, name: str, before: str = "") -> str:
    """The text or whole number of this name after `before`; "" where the file has none."""
    value = values.get(name) if isinstance(values, dict) else None
    return f"{before}{value}" if isinstance(value, str | int) else ""


def _is_numbers(values: dict) -> bool:
    return all(
        type(x) is float or (type(x) is int and abs(x) < LARGEST_INT) for x in values.values()
    )


def _refused(path: epath.Path, reason: str) -> SetupError:
    return SetupError(f"{path} cannot be used: {reason}. {CURE}")


# --- what a checkpoint makes of images

SHOWN = 8  # images of the split, its first, so that nobody can have chosen them
NEIGHBOURS = 6  # per image
GROUND = "ground"  # what 0 in a mask means by custom; it stays clear


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
    """Examples whose pixels have classes."""

    images: np.ndarray  # uint8 BxHxWxC
    masks: np.ndarray  # int BxHxW
    predictions: np.ndarray  # int BxHxW
    classes: list[str]  # of pixels; one may be the ground
    head: str  # what predicted


class Measured(NamedTuple):
    classes: list[str]
    examples: Examples
    neighbours: Neighbourhood | None = None  # of runs with an encoder, and so are the tokens
    tokens: np.ndarray | None = None  # float32 BxHxWxD of the examples
    # Of runs that predict masked patches, or train a tokenizer: uint8 BxHxWxC by name of the row.
    panels: dict[str, np.ndarray] | None = None
    segmented: Segmented | None = None  # of data sets with masks


def measure(checkpoint: Checkpoint, cfg: Config, split: str) -> Measured:
    """Everything for the page from a checkpoint, on the devices that there are.

    `cfg` is its config, with the data directory of this machine; the examples are from `split`.

    Raises:
      SetupError: the checkpoint, its tokenizer or the data set don't fit together.
    """
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = math.ceil(cfg.eval.batch_size / mesh.size) * mesh.size
    cfg = changed(cfg, eval={"batch_size": batch_size})
    dataset = Dataset(cfg)
    batch = next((dataset.masked if cfg.needs_masks else dataset.eval)(split, mesh))
    images, labels, weight = features.on_host((batch.views[0], batch.label, batch.weight))
    shown = Examples(*(x[weight > 0][:SHOWN] for x in (images, labels)))
    if cfg.needs_masks:  # without labels each image is a class of its own
        shown = shown._replace(labels=np.arange(len(shown.images), dtype=np.int32))
        classes = [f"image {i + 1}" for i in range(SHOWN)]
    else:
        classes = dataset.class_names(split)
    found = Measured(classes, shown)
    if cfg.objective.leaves != "tokenizer":
        encoder = encoder_module.restore(checkpoint, mesh, batch_size)
        of_batch = encoder.features(batch.views[0])
        pooled, tokens = features.on_host((of_batch.pooled, of_batch.tokens))
        found = found._replace(tokens=tokens[: len(shown.images)])
        if not cfg.needs_masks:
            near = neighbourhood(encoder, pooled[: len(shown.images)], dataset, mesh)
            found = found._replace(neighbours=near)
        if cfg.data.masks.field in dataset.source.features:
            found = found._replace(segmented=segmented(encoder, dataset, split, mesh))
    if visualize.shows(cfg):
        restored, key = visualize.restore(checkpoint), jax.random.key(checkpoint.config.seed)
        rows = visualize.panels(restored, jax.numpy.asarray(shown.images), key)
        as_uint8 = {name: np.round((x + 1) * 127.5).astype(np.uint8) for name, x in rows.items()}
        found = found._replace(panels=as_uint8)
    return found


def neighbourhood(
    encoder: encoder_module.BoundEncoder, queries_BxD: np.ndarray, dataset: Dataset, mesh: Mesh
) -> Neighbourhood:
    """The nearest images of the training split, exactly."""
    bank = features.extract(encoder, dataset.eval(dataset.cfg.data.train_split, mesh))
    nearest = min(NEIGHBOURS, len(bank.label))
    similarity, index = knn.neighbours(queries_BxD, bank.pooled, nearest, mesh=mesh)
    source = dataset.records(dataset.cfg.data.train_split)
    make = transforms.EvalExample(dataset.cfg.data)
    ids = bank.id[index]
    images = np.stack([[make((int(i), source[i]))["image"] for i in row] for row in ids])
    return Neighbourhood(images, bank.label[index], similarity)


def segmented(
    encoder: encoder_module.BoundEncoder, dataset: Dataset, split: str, mesh: Mesh
) -> Segmented:
    """The first images with masks, and what a head makes of them: the run's, or one fitted now."""
    cfg = dataset.cfg
    batch = next(dataset.masked(split, mesh))
    found = encoder.features(batch.views[0])
    images, masks, tokens, weight = (
        x[:SHOWN] for x in features.on_host((*batch.views, batch.masks, found.tokens, batch.weight))
    )
    if cfg.needs_masks:
        (predictions,) = features.on_host((found.masks,))
        head = "the head that was trained with the encoder"
    else:
        name = cfg.eval.segmentation.heads[-1]
        print(f"Fitting a {name} head to the masks; it is for the page alone.", file=sys.stderr)
        subject = evaluate.Subject(encoder, dataset, split, mesh)
        segmenters, count = evaluate.fitted(subject, (name,))
        predictions = segmentation_module.predict(segmenters[name], tokens, masks.shape[1:], SHOWN)
        head = f"a {name} head, fitted to the frozen tokens of {count} training images,"
    values = range(-cfg.data.masks.offset, cfg.data.masks.num_classes - cfg.data.masks.offset)
    names = [f"class {value}" if value else GROUND for value in values]
    real = weight > 0
    return Segmented(images[real], masks[real], predictions[:SHOWN][real], names, head)
