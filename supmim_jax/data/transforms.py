"""From a record to the uint8 image that the encoder sees: numpy and OpenCV only.

An example's image is a function of (seed, view, epoch, id): its geometry of (seed, view, id), its
colours of (seed, epoch, id). A masked-token target is of the geometry alone, so that the tokens of
a view can be computed once, before training.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from supmim_jax.config import DataConfig, SetupError
from supmim_jax.data import augment
from supmim_jax.data.token_cache import TokenCache

cv2.setNumThreads(0)  # parallelism is over images

GEOMETRY, COLOURS = 0, 1  # streams of an example's random numbers


def generator(seed: int, number: int, example: int, stream: int) -> np.random.Generator:
    """The generator of one example's geometry in a view, or of its colours in an epoch."""
    return np.random.Generator(
        np.random.Philox(key=[seed, example], counter=[0, 0, stream, number])
    )


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


def decode_mask(encoded: bytes, image: np.ndarray, name: str) -> np.ndarray:
    """uint8 or uint16 HxW: the classes of the image's pixels; of a colour mask, the red channel.

    Raises:
      SetupError: the bytes are no image, or one of another size.
    """
    mask = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED) if encoded else None
    if mask is None or mask.shape[:2] != image.shape[:2]:
        found = f"{len(encoded)} bytes" if mask is None else f"of shape {mask.shape[:2]}"
        raise SetupError(
            f"{name}: the mask is {found}, but should be an image of {image.shape[:2]} pixels."
        )
    return mask if mask.ndim == 2 else mask[..., 2]  # OpenCV's order is blue, green, red


def crop_and_move(
    image: np.ndarray, cfg: DataConfig, rng: np.random.Generator
) -> tuple[np.ndarray, int]:
    """A view: uint8 image_size x image_size x C, and how many colour operations are left to do."""
    crop = {"inception": inception_crop, "random": random_crop}[cfg.crop]
    image = crop(image, cfg, rng)
    if cfg.flip and rng.random() < 0.5:
        image = image[:, ::-1]
    image = np.ascontiguousarray(image)
    if cfg.augment == "rand_augment":
        return augment.rand_geometry(image, cfg.augment_layers, cfg.augment_magnitude, rng)
    return image, 0


def coloured(
    view: np.ndarray, layers: int, cfg: DataConfig, rng: np.random.Generator
) -> np.ndarray:
    """The view with colour augmentation, which moves no pixel."""
    if cfg.augment == "rand_augment":
        return augment.rand_colour(view, layers, cfg.augment_magnitude, rng)
    if cfg.augment == "three_augment":
        return augment.three_augment(view, cfg.color_jitter, rng)
    return view


def eval_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """Shorter side to eval_resize, then the centre crop: uint8 image_size x image_size x C."""
    return _centre(resize(image, *_eval_extent(image, cfg)), cfg.image_size)


def eval_mask(mask: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """`eval_image` of a mask HxW, whose values are not mixed: each pixel is one of the mask's."""
    height, width = _eval_extent(mask, cfg)
    mask = cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST_EXACT)
    return _centre(mask, cfg.image_size)


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
    views: int  # that an image's geometry cycles through
    with_target: bool = False  # also the view before colour augmentation
    tokens: TokenCache | None = None

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        epoch, example, record = drawn
        view = epoch % self.views
        target, layers = self.target(view, example, record)
        colours = generator(self.seed, epoch, example, COLOURS)
        image = coloured(target, layers, self.cfg, colours)
        found = packed(image, record["label"], example, 1.0)
        if self.with_target:
            found["target"] = target
        if self.tokens is not None:
            found["tokens"] = self.tokens[view, example]
        return found

    def target(self, view: int, example: int, record: dict) -> tuple[np.ndarray, int]:
        """What tokens are computed of, and the number of colour operations that would follow."""
        image = decode(record["image"], self.cfg.channels, f"{self.cfg.name} record {example}")
        return crop_and_move(image, self.cfg, generator(self.seed, view, example, GEOMETRY))


@dataclass(frozen=True)
class TargetExample:
    """Grain transform: (view, id, record) to the image whose tokens a cache holds."""

    example: TrainExample

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        return {"image": self.example.target(*drawn)[0]}


@dataclass(frozen=True)
class EvalExample:
    """Grain transform: (id, record) to one example; id -1 is padding."""

    cfg: DataConfig

    def __call__(self, drawn: tuple[int, dict]) -> dict:
        example, record = drawn
        image = decode(record["image"], self.cfg.channels, f"{self.cfg.name} record {example}")
        return packed(eval_image(image, self.cfg), record["label"], example, float(example >= 0))


@dataclass(frozen=True)
class MaskedExample:
    """Grain transform: (id, record with a mask) to one example; its label says nothing."""

    cfg: DataConfig

    def __call__(self, drawn: tuple[int, dict]) -> dict:
        example, record = drawn
        name = f"{self.cfg.name} record {example}"
        image = decode(record["image"], self.cfg.channels, name)
        mask = eval_mask(decode_mask(record["mask"], image, name), self.cfg)
        found = packed(eval_image(image, self.cfg), 0, example, float(example >= 0))
        return found | {"mask": mask.astype(np.int32)}


def packed(image: np.ndarray, label: int, example: int, weight: float) -> dict:
    return {
        "image": image,
        "label": np.int32(label),
        "weight": np.float32(weight),
        "id": np.int32(example),
    }
