"""Augmentations of uint8 HxWx3 images beside crop and flip: RandAugment and 3-Augment."""

import cv2
import numpy as np

GREY = (128, 128, 128)  # what geometric operations bring in at the border


def rand_geometry(
    image: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """The operations of RandAugment that move pixels: the image, and how many others remain.

    RandAugment (arXiv 1909.13719) applies `layers` operations, each drawn uniformly, with one
    magnitude: 10 is the strongest of AutoAugment's ranges and 15 half as much again, as in AugReg's
    code; Cutout, SolarizeAdd and the probability of skipping are left out. Here those that move
    pixels come first, so that an image has one geometry, whatever its colours.
    """
    others = 0
    for _ in range(layers):
        place = rng.integers(len(GEOMETRY) + len(COLOUR))
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if place < len(GEOMETRY):
            image = list(GEOMETRY.values())[place](image, magnitude / 10.0, sign)
        else:
            others += 1
    return image, others


def rand_colour(
    image: np.ndarray, layers: int, magnitude: float, rng: np.random.Generator
) -> np.ndarray:
    """`layers` operations of RandAugment that leave every pixel in its place."""
    for _ in range(layers):
        operation = list(COLOUR.values())[rng.integers(len(COLOUR))]
        sign = 1.0 if rng.random() < 0.5 else -1.0
        image = operation(image, magnitude / 10.0, sign)
    return image


def three_augment(image: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """3-Augment (DeiT-III, arXiv 2204.07118, section 3): one of grey, solarise, blur; then jitter.

    Grey, solarisation and Gaussian blur are equally likely; brightness, contrast and saturation
    then change by a factor in [1 - jitter, 1 + jitter], in random order.
    """
    choice = rng.integers(3)
    if choice == 0:
        image = saturated(image, 0.0)
    elif choice == 1:
        image = np.where(image < 128, image, 255 - image)
    else:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.1, 2.0))
    return jittered(image, jitter, rng)


def jittered(image: np.ndarray, jitter: float, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast and saturation in random order, each by [1 - jitter, 1 + jitter]."""
    for which in rng.permutation(3):
        change = (brightened, contrasted, saturated)[which]
        image = change(image, rng.uniform(1.0 - jitter, 1.0 + jitter))
    return image


def erased(image: np.ndarray, probability: float, rng: np.random.Generator) -> np.ndarray:
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
    """low + factor * (image - low), clipped to uint8."""
    return np.clip(low + factor * (image.astype(np.float32) - low), 0, 255).astype(np.uint8)


def brightened(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.float32(0), image, factor)


def contrasted(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(np.float32(luminance(image).mean()), image, factor)


def saturated(image: np.ndarray, factor: float) -> np.ndarray:
    return blend(luminance(image)[..., None], image, factor)


def enhancement(strength: float, sign: float) -> float:
    """Factor of brightness, contrast, saturation or sharpness; never below 0.1."""
    return max(1.0 + sign * 0.9 * strength, 0.1)


def luminance(image: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma, float32 HxW."""
    return image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)


def sharpened(image: np.ndarray, factor: float) -> np.ndarray:
    smooth = cv2.blur(image, (3, 3)).astype(np.float32)
    return blend(smooth, image, factor)


def equalized(image: np.ndarray) -> np.ndarray:
    return np.stack(
        [cv2.equalizeHist(np.ascontiguousarray(c)) for c in np.moveaxis(image, -1, 0)], -1
    )


def autocontrasted(image: np.ndarray) -> np.ndarray:
    low, high = image.min((0, 1)).astype(np.float32), image.max((0, 1)).astype(np.float32)
    scale = np.where(high > low, 255.0 / np.maximum(high - low, 1.0), 1.0)
    return np.clip((image - np.where(high > low, low, 0.0)) * scale, 0, 255).astype(np.uint8)


def solarized(image: np.ndarray, threshold: float) -> np.ndarray:
    return np.where(image < threshold, image, 255 - image)


def posterized(image: np.ndarray, bits: int) -> np.ndarray:
    return image & np.uint8(256 - (1 << (8 - bits)))


def sheared(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Affine map by shears about the image's centre."""
    height, width = image.shape[:2]
    return warped(image, np.float64([[1, x, -x * height / 2], [y, 1, -y * width / 2]]))


def translated(image: np.ndarray, x: float, y: float) -> np.ndarray:
    """Shift by shares of the width and height."""
    return warped(image, np.float64([[1, 0, x * image.shape[1]], [0, 1, y * image.shape[0]]]))


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    height, width = image.shape[:2]
    centre = ((width - 1) / 2, (height - 1) / 2)
    return warped(image, cv2.getRotationMatrix2D(centre, degrees, 1.0))


def warped(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    size = (image.shape[1], image.shape[0])
    return cv2.warpAffine(image, matrix, size, flags=cv2.INTER_LINEAR, borderValue=GREY)


# Operation(image, strength, sign): 1 is the end of AutoAugment's range (arXiv 1805.09501, table 6),
# and a larger strength changes more.
GEOMETRY = {
    "rotate": lambda image, strength, sign: rotated(image, sign * 30.0 * strength),
    "shear_x": lambda image, strength, sign: sheared(image, sign * 0.3 * strength, 0.0),
    "shear_y": lambda image, strength, sign: sheared(image, 0.0, sign * 0.3 * strength),
    "translate_x": lambda image, strength, sign: translated(image, sign * 0.45 * strength, 0.0),
    "translate_y": lambda image, strength, sign: translated(image, 0.0, sign * 0.45 * strength),
}
COLOUR = {
    "autocontrast": lambda image, strength, sign: autocontrasted(image),
    "equalize": lambda image, strength, sign: equalized(image),
    "invert": lambda image, strength, sign: 255 - image,
    "posterize": lambda image, strength, sign: posterized(image, max(4 - int(4 * strength), 1)),
    "solarize": lambda image, strength, sign: solarized(image, max(256 - 256 * strength, 0)),
    "color": lambda image, strength, sign: saturated(image, enhancement(strength, sign)),
    "contrast": lambda image, strength, sign: contrasted(image, enhancement(strength, sign)),
    "brightness": lambda image, strength, sign: brightened(image, enhancement(strength, sign)),
    "sharpness": lambda image, strength, sign: sharpened(image, enhancement(strength, sign)),
}
