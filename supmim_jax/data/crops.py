"""Crops of images and of their masks: which part, and how it is brought to the encoder's size.

Where a crop lies whose centre is drawn in a box (ContrastiveCrop, arXiv 2202.03278, section 3).

Semantic-aware localisation: the box is around what the image shows, so that crops hold some of it.
Centre-suppressed sampling: with alpha < 1 the density of Beta(alpha, alpha) is U-shaped, so that
two crops of one image seldom lie on each other.

A table of boxes is uint8 Nx4: top, left, bottom and right of each record's box, in 255ths of its
image's height or width; (0, 0, 255, 255) is the whole image."""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from supmim_jax.config import DataConfig

UNITS = 255  # of an image's height or width
WHOLE = (0, 0, UNITS, UNITS)
CENTRE = (64, 64, 191, 191)  # half the height and width, as near as 255ths come (SimCCrop)


def offsets(
    image: tuple[int, int],
    crop: tuple[int, int],
    bounds: Sequence[int],
    alpha: float,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Top and left, in pixels, of a crop whose centre is drawn in a box.

    As in the published code (github.com/xyupeng/ContrastiveCrop, its later version): the range of
    each coordinate is first cut to where the crop is inside the image, Beta is over what is left,
    and pixels are rounded down. A box without extent gives a crop around it, and opposite edges may
    come in either order.

    Args:
      image: height and width.
      crop: height and width, at most the image's.
      bounds: a row of a table of boxes.
      alpha: of the Beta distribution; 1 is uniform.
      rng: gives two numbers.
    """
    edges = tuple(int(edge) for edge in bounds)  # uint8 would overflow
    found = []
    for axis in (0, 1):
        room = image[axis] - crop[axis]
        first, last = (
            min(max(image[axis] * edge // UNITS - crop[axis] // 2, 0), room)
            for edge in edges[axis::2]
        )
        found.append(first + int((last - first) * rng.beta(alpha, alpha)))
    return found[0], found[1]


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
    height: int,
    width: int,
    cfg: DataConfig,
    rng: np.random.Generator,
    bounds: Sequence[int] | None = None,
) -> Crop:
    """The crop of an image of this size.

    Args:
      height: of the image, in pixels.
      width: likewise.
      cfg: says which crop.
      rng: all that is drawn comes from it.
      bounds: what contrastive crops with boxes "heat_map" are around, a row of a table of boxes
        (contrastive_crop.py). None, as before such boxes are found: they are inception crops.
    """
    if cfg.crop == "random":
        extent, box = random_crop(height, width, cfg, rng)
    elif cfg.crop == "inception":
        extent, box = inception_crop(height, width, cfg, rng)
    elif cfg.crop == "inception_tf":
        extent, box = inception_tf_crop(height, width, cfg, rng)
    else:
        fixed = cfg.contrastive_crop.boxes == "centre"
        bounds = CENTRE if fixed else bounds
        extent, box = inception_crop(height, width, cfg, rng, bounds)
    return Crop(extent, box, cfg.flip and rng.random() < 0.5)


def cropped(image: np.ndarray, crop: Crop, cfg: DataConfig) -> np.ndarray:
    """The crop of an image as uint8 image_size x image_size x C."""
    return finished(crop.box.of(resize(image, *crop.extent, cfg.resize)), crop, cfg)


def finished(part: np.ndarray, crop: Crop, cfg: DataConfig) -> np.ndarray:
    """The crop, given what its box holds."""
    part = resize(part, cfg.image_size, cfg.image_size, cfg.resize)
    if crop.mirrored:
        part = cv2.flip(part, 1).reshape(part.shape)
    return np.ascontiguousarray(part)


def cropped_mask(mask: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """The crop of a mask HxW, whose values are not mixed: each pixel is one of the mask's."""
    mask = resize_mask(crop.box.of(resize_mask(mask, *crop.extent)), size, size)
    return np.ascontiguousarray(mask[:, ::-1] if crop.mirrored else mask)


def eval_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """Shorter side to eval_resize, then the centre crop: uint8 image_size x image_size x C."""
    return _centre(resize(image, *_eval_extent(image, cfg), cfg.resize), cfg.image_size)


def whole_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """All of the image, whatever its aspect: uint8 image_size x image_size x C."""
    return resize(image, cfg.image_size, cfg.image_size, cfg.resize)


def eval_mask(mask: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """`eval_image` of a mask HxW, whose values are not mixed: each pixel is one of the mask's."""
    return _centre(resize_mask(mask, *_eval_extent(mask, cfg)), cfg.image_size)


def _eval_extent(image: np.ndarray, cfg: DataConfig) -> tuple[int, int]:
    """Height and width with the shorter side at eval_resize."""
    height, width = image.shape[:2]
    scale = cfg.eval_resize / min(height, width)
    return (
        max(round(height * scale), cfg.eval_resize),
        max(round(width * scale), cfg.eval_resize),
    )


def _centre(image: np.ndarray, size: int) -> np.ndarray:
    top, left = ((extent - size) // 2 for extent in image.shape[:2])
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def inception_crop(
    height: int,
    width: int,
    cfg: DataConfig,
    rng: np.random.Generator,
    bounds: Sequence[int] | None = None,
) -> tuple[tuple[int, int], Box]:
    """A box of random area and aspect of the image as it is (Szegedy et al., arXiv 1409.4842).

    Area uniform in [min_crop_area, 1] of the image, aspect log-uniform in [3/4, 4/3]; its place is
    uniform, or given `bounds` that of a ContrastiveCrop. After ten misses the largest square, in
    the centre.
    """
    for _ in range(10):
        area = height * width * rng.uniform(cfg.min_crop_area, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            if bounds is None:
                top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            else:
                alpha = cfg.contrastive_crop.alpha
                top, left = offsets((height, width), (h, w), bounds, alpha, rng)
            return (height, width), Box(int(top), int(left), h, w)
    side = min(height, width)
    return (height, width), Box((height - side) // 2, (width - side) // 2, side, side)


def inception_tf_crop(
    height: int, width: int, cfg: DataConfig, rng: np.random.Generator
) -> tuple[tuple[int, int], Box]:
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
            return (height, width), Box(top, left, h, w)
    return (height, width), Box(0, 0, height, width)


def random_crop(
    height: int, width: int, cfg: DataConfig, rng: np.random.Generator
) -> tuple[tuple[int, int], Box]:
    """A box of image_size at a uniform place; smaller images are enlarged first."""
    size = cfg.image_size
    if min(height, width) < size:
        scale = size / min(height, width)
        height, width = max(round(height * scale), size), max(round(width * scale), size)
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return (height, width), Box(int(top), int(left), size, size)


def resize(image: np.ndarray, height: int, width: int, how: str = "area") -> np.ndarray:
    """uint8 HxWxC of another size.

    "area": pixel-area average of sides that shrink, then bicubic for those that grow. "linear":
    bilinear without smoothing, as TensorFlow's default, unless a side shrinks to less than half;
    then as "area".
    """
    if image.shape[:2] == (height, width):
        return image
    if how == "linear" and image.shape[0] <= 2 * height and image.shape[1] <= 2 * width:
        return _resized(image, (height, width), cv2.INTER_LINEAR)
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    for size, method in ((smaller, cv2.INTER_AREA), ((height, width), cv2.INTER_CUBIC)):
        if image.shape[:2] != size:
            image = _resized(image, size, method)
    return image


def _resized(image: np.ndarray, size: tuple[int, int], method: int) -> np.ndarray:
    return cv2.resize(image, size[::-1], interpolation=method).reshape(*size, -1)


def resize_mask(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel of the new size, HxW, has the value of the nearest."""
    if mask.shape == (height, width):
        return mask
    return cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
