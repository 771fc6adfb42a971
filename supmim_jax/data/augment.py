"""Augmentations of uint8 HxWx3 images beside crop and flip: 3-Augment, jitter, random erasing.

Below them are the operations that RandAugment (rand_augment.py) shares. Where nothing else is said
they are Pillow's, to the bit or to one step of 255 where floats are rounded.
"""

import cv2
import numpy as np

VALUES = np.arange(256)
SMOOTH = np.float32([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / np.float32(13)


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
    """Away from each pixel's average with its neighbours, which is rounded to the nearest.

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
    """Each channel by the sums of its histogram; a channel of one value stays as it is."""
    tables = []
    for channel in np.moveaxis(image, -1, 0):
        counts = np.bincount(channel.ravel(), minlength=256)
        step = (channel.size - counts[channel.max()]) // 255
        below = np.cumsum(counts) - counts
        tables.append((below + step // 2) // step if step else VALUES)
    return mapped(image, np.stack(tables, -1))


def autocontrasted(image: np.ndarray) -> np.ndarray:
    """Each channel stretched to 0 to 255; one of a single value stays as it is."""
    channels = np.moveaxis(image, -1, 0)
    low, high = np.array([(float(c.min()), float(c.max())) for c in channels]).T
    scale = 255.0 / np.maximum(high - low, 1.0)
    values = VALUES[:, None]
    return mapped(image, np.where(high > low, values * scale - low * scale, values))


def solarized(image: np.ndarray, threshold: int) -> np.ndarray:
    return mapped(image, np.where(threshold > VALUES, VALUES, 255 - VALUES))


def solarize_added(image: np.ndarray, addition: int) -> np.ndarray:
    """What is below 128 becomes brighter."""
    return mapped(image, np.where(VALUES < 128, VALUES + addition, VALUES))


def mapped(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Each value by a table of 256, or of 256x3 for each channel; what is outside is cut."""
    table = np.clip(table, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table if table.ndim == 1 else table[None])
