"""Arrays as images inside the page, and what is computed only to be looked at."""

import base64
from collections.abc import Mapping, Sequence

import cv2
import numpy as np

from supmim_jax.config import IGNORED
from supmim_jax.report.markup import Markup, element

LARGEST = 112  # pixels of a side on the page; larger images are reduced to that
SMALL = 64  # up to here pixels are shown as squares
GOLDEN = 0.61803398875  # of the hue circle: neighbouring class numbers look different


def image(pixels_uint8: np.ndarray, alt: str) -> Markup:
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


def cards(titles: Sequence[str], rows: Mapping[str, np.ndarray]) -> Markup:
    """A figure per example: its image of each row (uint8 BxHxWxC by name), side by side."""
    found = []
    for i, title in enumerate(titles):
        strip = (
            element("div", image(images[i], f"{name}; {title}"), name)
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
