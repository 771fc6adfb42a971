"""What a checkpoint makes of images: the arrays that the page shows.

Arrays as images inside the page, and what is computed only to be looked at.

Parts of the page that are images."""

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import cv2
import jax
import numpy as np
from jax.sharding import Mesh

from supmim_jax import encoder as encoder_module
from supmim_jax import sharding, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import IGNORED, Config, MeshConfig
from supmim_jax.data import source as source_module
from supmim_jax.data import transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.evals import evaluate, features, knn
from supmim_jax.evals import segmentation as segmentation_module
from supmim_jax.report.markup import Markup, Section, element, join, note, section, table

SHOWN = 8  # images of the split, its first, so that nobody can have chosen them
NEIGHBOURS = 6  # per image
GROUND = "ground"  # what 0 in a mask means by custom; it stays clear
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
    panels: Panels | None = None  # of runs that predict masked patches, or train a tokenizer
    segmented: Segmented | None = None  # of data sets with masks


def measure(checkpoint: Checkpoint, cfg: Config, split: str) -> Measured:
    """Everything for the page from a checkpoint, on the devices that there are.

    Args:
      checkpoint: of any run.
      cfg: its config, with the data directory of this machine.
      split: where the examples are from.

    Raises:
      SetupError: the checkpoint, its tokenizer or the data set don't fit together.
    """
    mesh = sharding.make_mesh(MeshConfig())
    batch_size = math.ceil(cfg.eval.batch_size / mesh.size) * mesh.size
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=batch_size))
    dataset = Dataset(cfg)
    batch = next((dataset.masked if cfg.needs_masks else dataset.eval)(split, mesh))
    images, labels, weight = features.on_host((batch.views[0], batch.label, batch.weight))
    shown = Examples(*(x[weight > 0][:SHOWN] for x in (images, labels)))
    if cfg.needs_masks:
        shown = shown._replace(labels=np.arange(len(shown.images), dtype=np.int32))
    found = Measured(class_names(dataset, split), shown)
    if cfg.objective.leaves != "tokenizer":
        encoder = encoder_module.restore(checkpoint, mesh, batch_size)
        of_batch = encoder.features(batch.views[0])
        pooled, tokens = features.on_host((of_batch.pooled, of_batch.tokens))
        found = found._replace(tokens=tokens[: len(shown.images)])
        if not cfg.needs_masks:
            near = neighbourhood(encoder, pooled[: len(shown.images)], dataset, mesh)
            found = found._replace(neighbours=near)
        if cfg.data.masks.field in source_module.feature_names(
            cfg.data
        ):  # else there is no picture
            found = found._replace(segmented=segmented(encoder, dataset, split, mesh))
    if visualize.shows(cfg):
        found = found._replace(panels=panels(checkpoint, shown.images))
    return found


def class_names(dataset: Dataset, split: str) -> list[str]:
    """Those of the data set; a class that is only a number is called "class 7".

    Without labels, each of the images that are shown is a class of its own.
    """
    cfg = dataset.cfg
    if cfg.needs_masks:
        return [f"image {i + 1}" for i in range(SHOWN)]
    names = dataset.records(split).features[cfg.data.label_field].names
    return [f"class {name}" if name.isdecimal() else name for name in names]


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
        subject = evaluate.Subject(encoder, dataset, split, mesh)
        segmenters, count = evaluate.fitted(subject, (name,))
        predictions = segmentation_module.predict(segmenters[name], tokens, masks.shape[1:], SHOWN)
        head = f"a {name} head, fitted to the frozen tokens of {count} training images,"
    values = range(-cfg.data.masks.offset, cfg.data.masks.num_classes - cfg.data.masks.offset)
    names = [f"class {value}" if value else GROUND for value in values]
    real = weight > 0
    return Segmented(images[real], masks[real], predictions[:SHOWN][real], names, head)


def panels(checkpoint: Checkpoint, images_uint8: np.ndarray) -> Panels:
    """Images, masked twins and what is predicted for them, as `picture` has them."""
    restored, key = visualize.restore(checkpoint), jax.random.key(checkpoint.config.seed)
    rows = visualize.panels(restored, jax.numpy.asarray(images_uint8), key)
    return {title: np.round((row + 1) * 127.5).astype(np.uint8) for title, row in rows.items()}


LARGEST = 112  # pixels of a side on the page; larger images are reduced to that
SMALL = 64  # up to here pixels are shown as squares
GOLDEN = 0.61803398875  # of the hue circle: neighbouring class numbers look different


def pictures_image(pixels_uint8: np.ndarray, alt: str) -> Markup:
    """An HxWx1 or HxWx3 image with its text for those who don't see it."""
    height, width = pixels_uint8.shape[:2]
    factor = LARGEST / max(height, width)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        pixels_uint8 = cv2.resize(pixels_uint8, size, interpolation=cv2.INTER_AREA)
    attributes = {"class_": "small"} if max(height, width) <= SMALL else {}
    return element("img", src=data_uri(pixels_uint8), alt=alt, **attributes)


def data_uri(pixels_uint8: np.ndarray) -> str:
    colours = pixels_uint8[..., ::-1] if pixels_uint8.shape[-1] == 3 else pixels_uint8
    _, encoded = cv2.imencode(".png", np.ascontiguousarray(colours))
    return f"data:image/png;base64,{base64.b64encode(encoded.tobytes()).decode()}"


def pictures_cards(titles: Sequence[str], rows: Mapping[str, np.ndarray]) -> Markup:
    """A figure per example: its image of each row (uint8 BxHxWxC by name), side by side."""
    found = []
    for i, title in enumerate(titles):
        strip = (
            element("div", pictures_image(images[i], f"{name}; {title}"), name)
            for name, images in rows.items()
        )
        caption = element("figcaption", title)
        found.append(element("figure", element("div", *strip, class_="strip"), caption))
    return element("div", *found, class_="cards")


def components(tokens_BxHxWxD: np.ndarray) -> np.ndarray:
    """The first three principal components over all tokens as colours, uint8 BxHxWx3.

    The sign of a component is that which makes its largest loading positive, and each spans the
    range of its colour, so that the same tokens always give the same colours. Components that
    the tokens don't have are 0.
    """
    *grid, width = tokens_BxHxWxD.shape
    rows_NxD = tokens_BxHxWxD.reshape(-1, width).astype(np.float64)
    rows_NxD = rows_NxD - rows_NxD.mean(axis=0)
    scale = np.abs(rows_NxD).max()
    _, spread, loadings = np.linalg.svd(rows_NxD, full_matrices=False)
    loadings = loadings[:3][spread[:3] > 1e-9 * max(scale, 1e-30)]
    largest = np.abs(loadings).argmax(axis=1)
    loadings = loadings * np.sign(loadings[np.arange(len(loadings)), largest])[:, None]
    found_NxK = rows_NxD @ loadings.T
    found_NxK = (found_NxK - found_NxK.min(axis=0)) / np.ptp(found_NxK, axis=0)
    colours = np.zeros((len(rows_NxD), 3))
    colours[:, : found_NxK.shape[1]] = found_NxK
    return np.round(255 * colours).astype(np.uint8).reshape(*grid, 3)


def enlarged(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Images BxHxWxC of another size, each pixel a rectangle."""
    down = np.arange(height) * images.shape[1] // height
    right = np.arange(width) * images.shape[2] // width
    return images[:, down][:, :, right]


def overlaid(
    images_uint8: np.ndarray, masks_BxHxW: np.ndarray, ground: int | None = None
) -> np.ndarray:
    """Images with the colours of their masks' classes; the ground and IGNORED stay clear."""
    grey = images_uint8.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    hidden = (masks_BxHxW == ground) | (masks_BxHxW == IGNORED)
    tinted = 0.4 * grey + 0.6 * class_colours(masks_BxHxW)
    return np.where(hidden[..., None], grey, tinted).round().astype(np.uint8)


def class_colours(classes: np.ndarray) -> np.ndarray:
    """A colour for each class number, uint8 ...x3: full hues around the circle."""
    hue = (classes * GOLDEN % 1.0)[..., None]
    wheel = np.abs((hue + np.array([0.0, 2 / 3, 1 / 3])) % 1.0 * 6 - 3) - 1
    return np.round(255 * np.clip(wheel, 0, 1)).astype(np.uint8)


def neighbours(examples: Examples, found: Neighbourhood, classes: Sequence[str]) -> Section:
    """A row per query; the frame and a mark tell whether a neighbour has the query's class."""
    rows = []
    for image, label, images, labels, similarity in zip(*examples, *found, strict=True):
        query = join(
            element("div", pictures_image(image, f"query, {classes[label]}"), class_="frame query"),
            classes[label],
        )
        near = zip(images, labels, similarity, strict=True)
        rows.append((query, *(neighbour(*one, label, classes) for one in near)))
    count, same = found.labels.size, int((found.labels == examples.labels[:, None]).sum())
    text = (
        f"The first {len(rows)} images of the split and the training images whose features are "
        f"most similar (cosine, below each). A whole frame and ✓: the query's class; a broken "
        f"frame and ✗: another. {same} of {count} neighbours have the query's class."
    )
    head = ("query", *(str(i + 1) for i in range(found.labels.shape[1])))
    grid = table("Nearest training images, the nearest first.", head, rows, class_="neighbours")
    return section("Nearest neighbours", "neighbours", note(text), grid)


def neighbour(
    image: np.ndarray, label: int, similarity: float, wanted: int, classes: Sequence[str]
) -> Markup:
    same = label == wanted
    kind, sign, mark = ("same", "✓", "tick") if same else ("other", "✗", "cross")
    told = "same class" if same else "another class"
    picture = pictures_image(image, f"neighbour, {classes[label]}, {told}")
    return join(
        element("div", picture, class_=f"frame {kind}"),
        element("span", sign, class_=mark),
        f" {classes[label]}",
        element("span", f"{similarity:.2f}", class_="soft"),
    )


def predictions(examples: Examples, panels: Panels, classes: Sequence[str]) -> Section:
    """Images, masked twins and predictions, or a tokenizer's images and reconstructions."""
    titles = [classes[label] for label in examples.labels]
    if "masked" not in panels:
        pairs = {"image": panels["image"], "reconstruction": panels["tokens"]}
        text = "The first images of the split, and what comes back from their tokens."
        return section("Reconstructions", "predictions", note(text), pictures_cards(titles, pairs))
    text = (
        "The first images of the split; their tokens decoded, which is the best that a prediction "
        "could look like; what the encoder sees of them; and the decoder's likeliest tokens in "
        "the masked places."
    )
    if "tokens" not in panels:
        text = (
            "The first images of the split; what the encoder sees of them; and the same with the "
            "decoder's predictions in the masked places. Where the target is normalised patches, "
            "the predictions have the mean and the contrast of the true ones."
        )
    cards = pictures_cards(titles, panels)
    return section("Masked-image prediction", "predictions", note(text), cards)


def views_components(
    examples: Examples, tokens_BxHxWxD: np.ndarray, classes: Sequence[str]
) -> Section:
    """The first three principal components of the patch tokens as red, green and blue."""
    height, width = examples.images.shape[1:3]
    colours = enlarged(components(tokens_BxHxWxD), height, width)
    cards = pictures_cards(
        [classes[label] for label in examples.labels],
        {"image": examples.images, "components": colours},
    )
    text = (
        "The first three principal components of the patch tokens of all images below, as red, "
        "green and blue: patches of like colour have like features, also across images."
    )
    return section("Patch tokens", "tokens", note(text), cards)


def segmentation(found: Segmented) -> Section:
    """Masks and predictions over their images."""
    titles, ground = [], found.classes.index(GROUND) if GROUND in found.classes else None
    for mask, prediction in zip(found.masks, found.predictions, strict=True):
        counted = mask != IGNORED
        agree = 100 * (mask == prediction)[counted].mean() if counted.any() else 0.0
        there = np.union1d(mask[counted], prediction[counted])
        names = ", ".join(found.classes[c] for c in there if c != ground)
        titles.append(f"{agree:.0f} % of pixels agree; {names or f'{GROUND} only'}")
    rows = {
        "image": found.images,
        "mask": overlaid(found.images, found.masks, ground),
        "prediction": overlaid(found.images, found.predictions, ground),
    }
    text = f"The masks of the data set and what {found.head} predicts, a colour per class."
    return section("Segmentation", "segmentation", note(text), pictures_cards(titles, rows))
