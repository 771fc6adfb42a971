"""Crops of images and of their masks: which part, and how it is brought to the encoder's size.

The centre of a crop may be drawn in a box (ContrastiveCrop, arXiv 2202.03278, section 3). The box
is around what the image shows, so that crops hold some of it. With alpha < 1 the density of
Beta(alpha, alpha) is U-shaped, so that two crops of one image seldom lie on each other.

A table of boxes is uint8 Nx4: top, left, bottom and right of each record's box, in 255ths of its
image's height or width; (0, 0, 255, 255) is the whole image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from supmim_jax.config import DataConfig

UNITS = 255  # of an image's height or width
WHOLE = (0, 0, UNITS, UNITS)
CENTRE = (64, 64, 191, 191)  # half the height and width, as near as 255ths come (SimCCrop)

cv2.setNumThreads(0)  # parallelism is over images


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


class Crop(NamedTuple):
    """An image is brought to `extent`; `box` of that to image_size, and perhaps mirrored."""

    extent: tuple[int, int]  # height, width
    box: Box
    mirrored: bool


def draw_crop(
    height: int, width: int, cfg: DataConfig, rng: Generator, bounds: Sequence[int] | None = None
) -> Crop:
    """The crop of an image of this size, as config.data.crop says.

    Args:
      height: of the image, in pixels.
      width: likewise.
      cfg: says which crop.
      rng: all that is drawn comes from it.
      bounds: what contrastive crops with boxes "heat_map" are around, a row of a table of boxes
        (contrastive_boxes.py). None, as before such boxes are found: they are inception crops.
    """
    extent = height, width
    if cfg.crop == "random":
        size = cfg.image_size
        if min(extent) < size:  # smaller images are enlarged first
            extent = _with_shorter_side(extent, size)
        top, left = (int(rng.integers(side - size + 1)) for side in extent)
        box = Box(top, left, size, size)
    elif cfg.crop == "inception_tf":
        box = inception_tf_crop(height, width, cfg, rng)
    elif cfg.crop == "inception":
        box = inception_crop(height, width, cfg, rng)
    else:
        bounds = CENTRE if cfg.contrastive_crop.boxes == "centre" else bounds
        box = inception_crop(height, width, cfg, rng, bounds)
    return Crop(extent, box, cfg.flip and rng.random() < 0.5)


def inception_crop(
    height: int, width: int, cfg: DataConfig, rng: Generator, bounds: Sequence[int] | None = None
) -> Box:
    """A box of random area and aspect (Szegedy et al., arXiv 1409.4842).

    Area uniform in [min_crop_area, 1] of the image, aspect log-uniform in [3/4, 4/3]; its place is
    uniform, or given `bounds` that of a ContrastiveCrop. After ten misses the largest square, in
    the centre.
    """
    for _ in range(10):
        area = height * width * rng.uniform(cfg.min_crop_area, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if not (0 < w <= width and 0 < h <= height):
            continue
        if bounds is None:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
        else:
            alpha = cfg.contrastive_crop.alpha
            top = _offset(height, h, bounds[::2], alpha, rng)
            left = _offset(width, w, bounds[1::2], alpha, rng)
        return Box(top, left, h, w)
    side = min(height, width)
    return Box((height - side) // 2, (width - side) // 2, side, side)


def _offset(image: int, crop: int, edges: Sequence[int], alpha: float, rng: Generator) -> int:
    """Top or left of a crop whose centre is drawn between two edges; all but these in pixels.

    As in the published code (github.com/xyupeng/ContrastiveCrop, its later version): the range is
    first cut to where the crop is inside the image, Beta is over what is left, and pixels are
    rounded down. A box without extent gives a crop around it, and edges may come in either order.
    """
    room = image - crop
    first, last = (  # edges of uint8 would overflow
        min(max(image * int(edge) // UNITS - crop // 2, 0), room) for edge in edges
    )
    return first + int((last - first) * rng.beta(alpha, alpha))


def inception_tf_crop(height: int, width: int, cfg: DataConfig, rng: Generator) -> Box:
    """A box as tf.image.sample_distorted_bounding_box draws it with the defaults of AugReg's code.

    Aspect uniform in [0.75, 1.33], then the height uniform in what the aspect, the image and
    [min_crop_area, 1] of its area allow. So small areas are likelier than in `inception_crop`: of
    0.05 to 1 the mean is 0.35, there 0.42. As there, a box never touches the bottom or right edge
    unless it is as high or wide as the image. After a hundred misses all of the image.
    """
    least, most = cfg.min_crop_area * height * width, height * width
    for _ in range(100):
        aspect = rng.uniform(0.75, 1.33)
        low, high = (round(np.sqrt(area / aspect)) for area in (least, most))
        if round(high * aspect) > width:
            high = int((width + 0.5 - 1e-7) / aspect)
        high = min(high, height)
        h = int(rng.integers(low, high + 1)) if low < high else high
        w = round(h * aspect)
        if w * h < least:  # by rounding
            h, w = h + 1, round((h + 1) * aspect)
        if w * h > most:
            h, w = h - 1, round((h - 1) * aspect)
        if least <= w * h <= most and 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(height - h)) if h < height else 0
            left = int(rng.integers(width - w)) if w < width else 0
            return Box(top, left, h, w)
    return Box(0, 0, height, width)


def cropped(image: np.ndarray, crop: Crop, cfg: DataConfig) -> np.ndarray:
    """The crop of an image as uint8 image_size x image_size x C."""
    return finished(crop.box.of(resize(image, *crop.extent, cfg.resize)), crop, cfg)


def finished(part: np.ndarray, crop: Crop, cfg: DataConfig) -> np.ndarray:
    """The crop, given what its box holds."""
    part = whole_image(part, cfg)
    if crop.mirrored:
        part = cv2.flip(part, 1).reshape(part.shape)
    return np.ascontiguousarray(part)


def cropped_mask(mask: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The crop of a mask HxW, whose values are not mixed: each pixel is one of the mask's."""
    mask = resize_mask(crop.box.of(resize_mask(mask, *crop.extent)), size, size)
    return np.ascontiguousarray(mask[:, ::-1] if crop.mirrored else mask)


def whole_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """All of the image, whatever its aspect: uint8 image_size x image_size x C."""
    return resize(image, cfg.image_size, cfg.image_size, cfg.resize)


def eval_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """Shorter side to eval_resize, then the centre crop: uint8 image_size x image_size x C."""
    extent = _with_shorter_side(image.shape[:2], cfg.eval_resize)
    return _centre(resize(image, *extent, cfg.resize), cfg.image_size)


def eval_mask(mask: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """`eval_image` of a mask HxW, whose values are not mixed: each pixel is one of the mask's."""
    extent = _with_shorter_side(mask.shape, cfg.eval_resize)
    return _centre(resize_mask(mask, *extent), cfg.image_size)


def _with_shorter_side(extent: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of about the same aspect, the shorter one of this size."""
    scale = size / min(extent)
    return max(round(extent[0] * scale), size), max(round(extent[1] * scale), size)


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top, left = ((extent - size) // 2 for extent in image.shape[:2])
    return np.ascontiguousarray(Box(top, left, size, size).of(image))


def resize(image: np.ndarray, height: int, width: int, how: str = "area") -> np.ndarray:
    """uint8 HxWxC of another size.

    "area": pixel-area average of sides that shrink, then bicubic for those that grow. "linear":
    bilinear without smoothing, as TensorFlow's default, unless a side shrinks to less than half;
    then as "area".
    """
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    steps = [(smaller, cv2.INTER_AREA), ((height, width), cv2.INTER_CUBIC)]
    if how == "linear" and image.shape[0] <= 2 * height and image.shape[1] <= 2 * width:
        steps = [((height, width), cv2.INTER_LINEAR)]
    for size, method in steps:
        if image.shape[:2] != size:
            image = cv2.resize(image, size[::-1], interpolation=method).reshape(*size, -1)
    return image


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of the new size, HxW, has the value of the nearest."""
    if mask.shape == (height, width):
        return mask
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
