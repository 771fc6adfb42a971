"""RandAugment (arXiv 1909.13719) of uint8 HxWx3 images, as two code bases have it.

"rand_augment" is AugReg's (big_vision's pp/autoaugment.py, also in scenic): 16 operations on
TensorFlow's arithmetic, every operation that is drawn is done. "timm_rand_augment" is timm's
rand-m9-mstd0.5-inc1, which DeiT and MAE fine-tune with: 15 operations of Pillow, each done with
probability 0.5 at a magnitude with noise, stronger where the magnitude is larger.

The originals do what they drew in the order in which they drew it. Here the operations that move
pixels come first, so that an image has one geometry whatever its colours and its tokens can be
computed before training. Which operations an image gets has the original's distribution.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

from supmim_jax.data import augment

# (image, level, generator) to the image; level 1.0 is magnitude 10, the most of AutoAugment. Signs
# and places are drawn from the generator.
Operation = Callable[[np.ndarray, float, np.random.Generator], np.ndarray]


class Family(NamedTuple):
    moving: dict[str, Operation]
    colours: dict[str, Operation]  # these leave every pixel in its place
    probability: float = 1.0  # that an operation that was drawn is done
    noise: float = 0.0  # deviation of the magnitude, which then stays in [0, 10]


def geometry(
    name: str, image: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """Draws `layers` operations of all; the image after those that move pixels, and the others.

    Returns:
      uint8 HxWx3, and how many of the operations are ones of colour, which `colours` does.
    """
    family, others = FAMILIES[name], 0
    for _ in range(layers):
        drawn = rng.integers(len(family.moving) + len(family.colours))
        if drawn < len(family.moving):
            image = _done(family, list(family.moving.values())[drawn], image, magnitude, rng)
        else:
            others += 1
    return image, others


def colours(
    name: str, image: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> np.ndarray:
    """The image after `layers` operations that leave every pixel in its place."""
    family = FAMILIES[name]
    for drawn in rng.integers(len(family.colours), size=layers):
        image = _done(family, list(family.colours.values())[drawn], image, magnitude, rng)
    return image


def _done(
    family: Family,
    operation: Operation,
    image: np.ndarray,
    magnitude: float,
    rng: np.random.Generator,
) -> np.ndarray:
    if rng.random() >= family.probability:
        return image
    if family.noise:
        magnitude = min(max(rng.normal(magnitude, family.noise), 0.0), 10.0)
    return operation(image, magnitude / 10.0, rng)


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _moving(
    affine: Callable[[np.ndarray, tuple[float, ...]], np.ndarray],
    inset: int,
    shift: Callable[[int], float],
) -> dict[str, Operation]:
    """Rotation about the middle, shears about the corner, shifts.

    Args:
      affine: an image by the six numbers of the map from a pixel to where it comes from.
      inset: subtracted from height and width to find the middle.
      shift: how far an image of this height or width is moved at level 1, in pixels.
    """

    def rotated(image: np.ndarray, level: float, rng: np.random.Generator) -> np.ndarray:
        angle = math.radians(_signed(30.0 * level, rng))
        cos, sin = math.cos(angle), math.sin(angle)
        y, x = ((size - inset) / 2 for size in image.shape[:2])
        return affine(image, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))

    def moved(image: np.ndarray, x: float = 0, y: float = 0, right: float = 0, down: float = 0):
        return affine(image, (1.0, x, right, y, 1.0, down))

    return {
        "rotate": rotated,
        "shear_x": lambda image, level, rng: moved(image, x=_signed(0.3 * level, rng)),
        "shear_y": lambda image, level, rng: moved(image, y=_signed(0.3 * level, rng)),
        "translate_x": lambda image, level, rng: moved(
            image, right=_signed(shift(image.shape[1]) * level, rng)
        ),
        "translate_y": lambda image, level, rng: moved(
            image, down=_signed(shift(image.shape[0]) * level, rng)
        ),
    }


def _nearest(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
    """TensorFlow's projective transform: the nearest pixel, grey from outside of the image."""
    y, x = (np.arange(size, dtype=np.float32) for size in image.shape[:2])
    places = []
    for p, q, r in np.float32(matrix).reshape(2, 3):
        at = (p * x[None, :] + q * y[:, None] + r).astype(np.float64)
        places.append(np.trunc(at + np.copysign(0.5, at)))  # halves away from zero
    places = np.stack(places, -1).astype(np.int16)
    return cv2.remap(image, places, None, cv2.INTER_NEAREST, borderValue=(128, 128, 128))


def _bicubic(image: np.ndarray, matrix: tuple[float, ...]) -> np.ndarray:
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
    share = image.astype(np.float32) * np.float32(1 / 255)
    return (share @ np.float32([0.2989, 0.5870, 0.1140]) * np.float32(255.5)).astype(np.int32)


def _posterized(image: np.ndarray, bits: int) -> np.ndarray:
    """Shifts in uint8, where a negative number wraps, and TensorFlow shifts by 7 at most."""
    shift = min((8 - bits) % 256, 7)
    return (image >> shift) << shift


def _cutout(image: np.ndarray, half: int, rng: np.random.Generator) -> np.ndarray:
    """A grey square around any pixel, as far as it is inside of the image."""
    y, x = (rng.integers(size) for size in image.shape[:2])
    image = image.copy()
    image[max(y - half, 0) : y + half, max(x - half, 0) : x + half] = 128
    return image


def _contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    """About the number of pixels / 256, which is 196 at 224 px, and not about their mean.

    A slip of the original (google-research/big_vision#109) that AugReg's models have seen.
    """
    middle = min(image[..., 0].size // 256, 255)
    return cv2.LUT(image, augment.blend(middle, augment.VALUES, factor))


def _enhanced(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    return lambda image, level, rng: change(image, 1.8 * level + 0.1)


def _enhanced_more(change: Callable[[np.ndarray, float], np.ndarray]) -> Operation:
    """timm's "increasing" form: away from 1, which changes nothing, in either direction."""
    return lambda image, level, rng: change(image, max(1.0 + _signed(0.9 * level, rng), 0.1))


SHARED = {
    "autocontrast": lambda image, level, rng: augment.autocontrasted(image),
    "equalize": lambda image, level, rng: augment.equalized(image),
    "invert": lambda image, level, rng: 255 - image,
    "solarize_add": lambda image, level, rng: augment.solarize_added(image, int(level * 110)),
}
IMAGENET_MEAN = (124, 116, 104)  # timm's fill

# Lengths are pixels of an image of 224, whatever the size. Solarize's threshold is a uint8: the 384
# of magnitude 15 is 128.
AUGREG = Family(
    moving=_moving(_nearest, 1, lambda size: 100.0),
    colours=SHARED
    | {
        "posterize": lambda image, level, rng: _posterized(image, int(level * 4)),
        "solarize": lambda image, level, rng: augment.solarized(image, int(level * 256) % 256),
        "color": _enhanced(lambda image, x: augment.blend(_grey(image)[..., None], image, x)),
        "contrast": _enhanced(_contrasted),
        "brightness": _enhanced(augment.brightened),
        "sharpness": _enhanced(lambda image, x: augment.sharpened(image, x, rounding=0.0)),
        "cutout": lambda image, level, rng: _cutout(image, int(level * 40), rng),
    },
)
TIMM = Family(
    moving=_moving(_bicubic, 0, lambda size: 0.45 * size),
    colours=SHARED
    | {
        # At magnitude 10, which noise reaches, no bit is kept: the image is black.
        "posterize": lambda image, level, rng: image & np.uint8(0xF0 << int(level * 4) & 0xFF),
        "solarize": lambda image, level, rng: augment.solarized(image, 256 - int(level * 256)),
        "color": _enhanced_more(augment.saturated),
        "contrast": _enhanced_more(augment.contrasted),
        "brightness": _enhanced_more(augment.brightened),
        "sharpness": _enhanced_more(augment.sharpened),
    },
    probability=0.5,
    noise=0.5,
)
FAMILIES = {"rand_augment": AUGREG, "timm_rand_augment": TIMM}  # by config.data.augment
