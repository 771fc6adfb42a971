"""From a record to the uint8 image that the encoder sees: numpy and OpenCV only.

Every function takes its random generator, so an example's image is a function of (seed, epoch,
id). Geometry is drawn before colour from the same generator; colour never moves the geometry.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from supmim_jax.config import DataConfig, SetupError
from supmim_jax.data import augment

cv2.setNumThreads(0)  # parallelism is over images


def generator(seed: int, epoch: int, example: int) -> np.random.Generator:
    """The random generator of one example in one epoch."""
    return np.random.Generator(np.random.Philox(key=[seed, example], counter=[0, 0, 0, epoch]))


def decode(encoded: bytes, channels: int, name: str) -> np.ndarray:
    """uint8 HxWxC (RGB or grey) from JPEG, PNG or any format of OpenCV.

    Raises:
      SetupError: the bytes are no image; `name` says which record they are.
    """
    flag = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    image = cv2.imdecode(np.frombuffer(encoded, np.uint8), flag) if encoded else None
    if image is None:
        raise SetupError(f"{name}: {len(encoded)} bytes are not an image that can be decoded.")
    return image.reshape(*image.shape[:2], channels)


def train_image(image: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Crop, flip and colour augmentation: uint8 image_size x image_size x C."""
    crop = {"inception": inception_crop, "random": random_crop}[cfg.crop]
    image = crop(image, cfg, rng)
    if cfg.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    image = np.ascontiguousarray(image)
    if cfg.augment == "rand_augment":
        image = augment.rand_augment(image, cfg.augment_layers, cfg.augment_magnitude, rng)
    elif cfg.augment == "three_augment":
        image = augment.three_augment(image, cfg.color_jitter, rng)
    return image


def eval_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """Shorter side to eval_resize, then the centre crop: uint8 image_size x image_size x C."""
    height, width = image.shape[:2]
    scale = cfg.eval_resize / min(height, width)
    image = resize(
        image,
        max(round(height * scale), cfg.eval_resize),
        max(round(width * scale), cfg.eval_resize),
    )
    top, left = ((extent - cfg.image_size) // 2 for extent in image.shape[:2])
    return np.ascontiguousarray(image[top : top + cfg.image_size, left : left + cfg.image_size])


def inception_crop(image: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """Random area and aspect, resized to image_size (Szegedy et al., arXiv 1409.4842).

    Area uniform in [min_crop_area, 1] of the image, aspect log-uniform in [3/4, 4/3]; after ten
    misses the largest square, in the centre.
    """
    height, width = image.shape[:2]
    for _ in range(10):
        area = height * width * rng.uniform(cfg.min_crop_area, 1.0)
        aspect = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        w, h = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            break
    else:
        w = h = min(height, width)
        top, left = (height - h) // 2, (width - w) // 2
    return resize(image[top : top + h, left : left + w], cfg.image_size, cfg.image_size)


def random_crop(image: np.ndarray, cfg: DataConfig, rng: np.random.Generator) -> np.ndarray:
    """A window of image_size at a uniform place; smaller images are enlarged first."""
    size = cfg.image_size
    height, width = image.shape[:2]
    if min(height, width) < size:
        scale = size / min(height, width)
        image = resize(image, max(round(height * scale), size), max(round(width * scale), size))
        height, width = image.shape[:2]
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    return image[top : top + size, left : left + size]


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixel-area average of sides that shrink, then bicubic for those that grow; uint8 HxWxC."""
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    for size, method in ((smaller, cv2.INTER_AREA), ((height, width), cv2.INTER_CUBIC)):
        if image.shape[:2] != size:
            image = cv2.resize(image, size[::-1], interpolation=method).reshape(*size, -1)
    return image


@dataclass(frozen=True)
class TrainExample:
    """Grain transform: (epoch, id, record) to one augmented example."""

    cfg: DataConfig
    seed: int

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        epoch, example, record = drawn
        image = decode(record["image"], self.cfg.channels, f"{self.cfg.name} record {example}")
        image = train_image(image, self.cfg, generator(self.seed, epoch, example))
        return packed(image, record["label"], example, 1.0)


@dataclass(frozen=True)
class EvalExample:
    """Grain transform: (id, record) to one example; id -1 is padding."""

    cfg: DataConfig

    def __call__(self, drawn: tuple[int, dict]) -> dict:
        example, record = drawn
        image = decode(record["image"], self.cfg.channels, f"{self.cfg.name} record {example}")
        return packed(eval_image(image, self.cfg), record["label"], example, float(example >= 0))


def packed(image: np.ndarray, label: int, example: int, weight: float) -> dict:
    return {
        "image": image,
        "label": np.int32(label),
        "weight": np.float32(weight),
        "id": np.int32(example),
    }
