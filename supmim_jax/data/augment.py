"""Augmentations of uint8 HxWx3 images, other than crop and flip.

Unless a docstring says otherwise, operations match Pillow's exactly, or within one step of 255
where floats are rounded.

There are two versions of RandAugment (arXiv 1909.13719). "rand_augment" is AugReg's (big_vision's
pp/autoaugment.py, also in scenic): 16 operations with TensorFlow's arithmetic, and every operation
that is drawn is applied. "timm_rand_augment" is timm's rand-m9-mstd0.5-inc1, with which DeiT and
MAE fine-tune: 15 of Pillow's operations, each applied with probability 0.5, at a random magnitude,
and stronger where the magnitude is larger.

The originals apply operations in the order in which they drew them. Here those that move pixels
come first, so that an image's geometry does not depend on its colours and its tokens can be
computed before training. Which operations an image gets has the original's distribution.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

VALUES = np.arange(256)
SMOOTH = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / np.float32(13)


def three_augment(image: np.ndarray, jitter: float, rng: Generator) -> np.ndarray:
    """3-Augment (DeiT-III, arXiv 2204.07118, section 3): one of grey, solarise, blur; then jitter.

    Grey, solarisation and Gaussian blur are equally likely; the jitter is that of `jittered`.
    """
    choice = rng.integers(3)
    if choice == 0:
        image = saturated(image, 0.0)
    elif choice == 1:
        image = solarized(image, 128)
    else:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, 2.0))
    return jittered(image, jitter, rng)


def jittered(image: np.ndarray, jitter: float, rng: Generator) -> np.ndarray:
    """Brightness, contrast and saturation in random order, each by [1 - jitter, 1 + jitter]."""
    for which in rng.permutation(3):
        change = (brightened, contrasted, saturated)[which]
        image = change(image, rng.uniform(1.0 - jitter, 1.0 + jitter))
    return image


def erased(image: np.ndarray, probability: float, rng: Generator) -> np.ndarray:
    """Random erasing (arXiv 1708.04896): noise in one rectangle, with this probability.

    Area uniform in [0.02, 1/3] of the image and aspect log-uniform in [0.3, 3.3], drawn anew up to
    ten times until the rectangle fits; normal noise, grey on average, as in timm's "pixel" mode.
    """
    if not probability or rng.random() >= probability:
        return image
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < h < height and 0 < w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            image = image.copy()
            noise = 127.5 + 63.75 * rng.standard_normal((h, w, image.shape[2]), np.float32)
            image[top : top + h, left : left + w] = np.clip(noise, 0, 255)
            return image
    return image


def blend(low, image: np.ndarray, factor: float) -> np.ndarray:
    """low + factor * (image - low) in float32, cut to uint8."""
    low = np.float32(low)
    return np.clip(low + factor * (image.astype(np.float32) - low), 0, 255).astype(np.uint8)


def brightened(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(image, blend(0, VALUES, factor))


def contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    return cv2.LUT(image, blend(int(grey(image).mean() + 0.5), VALUES, factor))


def saturated(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(grey(image)[..., None], image, factor)


def sharpened(image: np.ndarray, factor: float, rounding: float = 0.5) -> np.ndarray:
    """Moves pixels away from their average with their neighbours, which is rounded to nearest.

    The outermost rows and columns, which lack neighbours, stay as they are.
    """
    smooth = image.copy()
    average = cv2.filter2D(image.astype(np.float32), -1, SMOOTH)
    smooth[1:-1, 1:-1] = (average + rounding)[1:-1, 1:-1]
    return blend(smooth, image, factor)


def grey(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, int32 HxW."""
    red, green, blue = np.moveaxis(image.astype(np.int32), -1, 0)
    return (19595 * red + 38470 * green + 7471 * blue + 2**15) >> 16


def equalized(image: np.ndarray) -> np.ndarray:
    """Equalises the histogram of each channel; a channel of one value does not change."""
    tables = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - counts[channel.max()]) // 255
        below = np.cumsum(counts) - counts
        tables.append((below + step // 2) // step if step else VALUES)
    return mapped(image, np.stack(tables, -1))


def autocontrasted(image: np.ndarray) -> np.ndarray:
    """Stretches each channel to 0 to 255; a channel of one value does not change."""
    channels = np.moveaxis(image, -1, 0)
    low, high = np.array([(float(c.min()), float(c.max())) for c in channels]).T
    scale = 255.0 / np.maximum(high - low, 1.0)
    values = VALUES[:, None]
    return mapped(image, np.where(high > low, values * scale - low * scale, values))


def solarized(image: np.ndarray, threshold: int) -> np.ndarray:
    return mapped(image, np.where(threshold > VALUES, VALUES, 255 - VALUES))


def mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Maps values by a table of 256, or of 256x3 by channel; the table is clipped to uint8."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])


# (image, level, generator) to the image; level 1.0 is magnitude 10, the most of AutoAugment. Signs
# and places are drawn from the generator.
Operation = Callable[[np.ndarray, float, Generator], np.ndarray]


class Family(NamedTuple):
    moving: dict[str, Operation]
    colours: dict[str, Operation]  # these leave every pixel in its place
    probability: float = 1.0  # that an operation that was drawn is done
    noise: float = 0.0  # deviation of the magnitude, which then stays in [0, 10]

    def done(
        self, operation: Operation, image: np.ndarray, magnitude: float, rng: Generator
    ) -> np.ndarray:
        """The image after the operation, or as it is."""
        if rng.random() >= self.probability:
            return image
        if self.noise:
            magnitude = min(max(rng.normal(magnitude, self.noise), 0.0), 10.0)
        return operation(image, magnitude / 10.0, rng)


def geometry(
    name: str, image: np.ndarray, layers: int, magnitude: float, rng: Generator
) -> tuple[np.ndarray, int]:
    """Draws `layers` operations of all; the image after those that move pixels, and the others.

    Returns:
      uint8 HxWx3, and how many of the operations are ones of colour, which `colours` does.
    """
    family, others = FAMILIES[name], 0
    moving = list(family.moving.values())
    for _ in range(layers):
        drawn = rng.integers(len(moving) + len(family.colours))
        if drawn < len(moving):
            image = family.done(moving[drawn], image, magnitude, rng)
        else:
            others += 1
    return image, others


def colours(
    name: str, image: np.ndarray, layers: int, magnitude: float, rng: Generator
) -> np.ndarray:
    """The image after `layers` operations that leave every pixel in its place."""
    family = FAMILIES[name]
    operations = list(family.colours.values())
    for drawn in rng.integers(len(operations), size=layers):
        image = family.done(operations[drawn], image, magnitude, rng)
    return image


def _signed(value: float, rng: Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _moving(
    affine: Callable[[np.ndarray, Sequence[float]], np.ndarray],
    inset: int,
    shift: Callable[[int], float],
) -> dict[str, Operation]:
    """Rotation about the middle, shears about the corner, shifts.

    Args:
      affine: an image by the six numbers of the map from a pixel to where it comes from.
      inset: subtracted from height and width to find the middle.
      shift: how far an image of this height or width is moved at level 1, in pixels.
    """

    def rotated(image: np.ndarray, level: float, rng: Generator) -> np.ndarray:
        angle = math.radians(_signed(30.0 * level, rng))
        cos, sin = math.cos(angle), math.sin(angle)
        y, x = ((size - inset) / 2 for size in image.shape[:2])
        return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))

    def shifted(place: int, value: Callable[[np.ndarray, float], float]) -> Operation:
        def operation(image: np.ndarray, level: float, rng: Generator) -> np.ndarray:
            matrix = [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
            matrix[place] = _signed(value(image, level), rng)
            return affine(image, matrix)

        return operation

    return {
        "rotate": rotated,
        "shear_x": shifted(1, lambda image, level: 0.3 * level),
        "shear_y": shifted(3, lambda image, level: 0.3 * level),
        "translate_x": shifted(2, lambda image, level: shift(image.shape[1]) * level),
        "translate_y": shifted(5, lambda image, level: shift(image.shape[0]) * level),
    }


def _nearest(image: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """TensorFlow's projective transform: the nearest pixel, grey from outside of the image."""
    y, x = (np.arange(size, dtype=np.float32) for size in image.shape[:2])
    places = []
    for p, q, r in np.float32(matrix).reshape(2, 3):
        at = (p * x[None, :] + q * y[:, None] + r).astype(np.float64)
        places.append(np.trunc(at + np.copysign(0.5, at)))  # halves away from zero
    places = np.stack(places, -1).astype(np.int16)
    return cv2.remap(image, places, None, cv2.INTER_NEAREST, borderValue=(128, 128, 128))


def _bicubic(image: np.ndarray, matrix: Sequence[float]) -> np.ndarray:
    """Pillow's affine transform, which counts from the corner and fills only outside of the image.

    The parameter of OpenCV's cubic is -0.75 and of Pillow's -1: ours is a little less sharp.
    """
    height, width = image.shape[:2]
    inverse = np.float64(matrix).reshape(2, 3)
    x, y = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    column, row = (p * x + q * y + r for p, q, r in inverse)
    inverse[:, 2] += inverse[:, :2].sum(1) / 2 - 0.5  # OpenCV counts from the first pixel's centre
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    moved = cv2.warpAffine(image, inverse, (width, height), None, flags, cv2.BORDER_REPLICATE)
    moved[(column < 0) | (column >= width) | (row < 0) | (row >= height)] = IMAGENET_MEAN
    return moved


def _grey(image: np.ndarray) -> np.ndarray:
    """tf.image.rgb_to_grayscale, int32 HxW."""
    share = image.astype(np.float32) * (np.float32([0.2989, 0.5870, 0.1140]) * np.float32(1 / 255))
    # Added one by one: a product of matrices is rounded in another way on each processor.
    grey = share[..., 0] + share[..., 1] + share[..., 2]
    return (grey * np.float32(255.5)).astype(np.int32)


def _cutout(image: np.ndarray, half: int, rng: Generator) -> np.ndarray:
    """A grey square around a random pixel, cut off at the edges of the image."""
    y, x = (rng.integers(size) for size in image.shape[:2])
    image = image.copy()
    image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 128
    return image


def _contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    """Contrast about the number of pixels / 256 (196 at 224 px) rather than about the mean.

    A slip of the original (google-research/big_vision#109) that AugReg's models have seen.
    """
    middle = min(image[..., 0].size // 256, 255)
    return cv2.LUT(image, blend(middle, VALUES, factor))


def _enhanced(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    return lambda image, level, rng: change(image, 1.8 * level + 0.1)


def _enhanced_more(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    """timm's "increasing" form: a factor below or above 1, where 1 changes nothing."""
    return lambda image, level, rng: change(image, max(1.0 + _signed(0.9 * level, rng), 0.1))


SHARED = {
    "autocontrast": lambda image, level, rng: autocontrasted(image),
    "equalize": lambda image, level, rng: equalized(image),
    "invert": lambda image, level, rng: 255 - image,
    "solarize_add": lambda image, level, rng: mapped(
        image, np.where(VALUES < 128, VALUES + int(level * 110), VALUES)
    ),
}
IMAGENET_MEAN = (124, 116, 104)  # timm's fill

# Lengths are pixels of an image of 224, whatever the size. Solarize's threshold is a uint8: the 384
# of magnitude 15 is 128.
AUGREG = Family(
    moving=_moving(_nearest, 1, lambda size: 100.0),
    colours=SHARED
    | {
        # Shifts in uint8, where a negative number wraps; TensorFlow shifts by 7 at most.
        "posterize": lambda image, level, rng: (
            image >> (shift := min((8 - int(level * 4)) % 256, 7)) << shift
        ),
        "solarize": lambda image, level, rng: solarized(image, int(level * 256) % 256),
        "color": _enhanced(lambda image, x: blend(_grey(image)[..., None], image, x)),
        "contrast": _enhanced(_contrasted),
        "brightness": _enhanced(brightened),
        "sharpness": _enhanced(lambda image, x: sharpened(image, x, rounding=0.0)),
        "cutout": lambda image, level, rng: _cutout(image, int(level * 40), rng),
    },
)
TIMM = Family(
    moving=_moving(_bicubic, 0, lambda size: 0.45 * size),
    colours=SHARED
    | {
        # At magnitude 10, which noise reaches, no bit is kept: the image is black.
        "posterize": lambda image, level, rng: image & np.uint8(0xF0 << int(level * 4) & 0xFF),
        "solarize": lambda image, level, rng: solarized(image, 256 - int(level * 256)),
        "color": _enhanced_more(saturated),
        "contrast": _enhanced_more(contrasted),
        "brightness": _enhanced_more(brightened),
        "sharpness": _enhanced_more(sharpened),
    },
    probability=0.5,
    noise=0.5,
)
FAMILIES = {"rand_augment": AUGREG, "timm_rand_augment": TIMM}  # by config.data.augment
