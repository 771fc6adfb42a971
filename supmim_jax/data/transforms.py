"""From a record to the uint8 image that the encoder sees, with numpy and OpenCV only.

An example's image is a function of (seed, view, epoch, id): its geometry depends on (seed, view,
id) and its colours on (seed, epoch, id). If a step sees two crops of an image, both also depend on
which of the two it is. Contrastive crops follow a table of boxes as well. A masked-token target
depends on the geometry alone, so a view's tokens can be computed once, before training.

ContrastiveCrop (arXiv 2202.03278, section 3) draws a crop's centre inside a box around what the
image shows, so that every crop holds some of it. With alpha < 1 the density of Beta(alpha, alpha)
is U-shaped, so two crops of one image seldom overlap fully. A table of boxes is uint8 Nx4: top,
left, bottom and right of each record's box, in 255ths of its image's height or width; (0, 0, 255,
255) is the whole image.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator, Philox

from supmim_jax.config import IGNORED, DataConfig
from supmim_jax.data import augment, source
from supmim_jax.data.decode import (
    Box,
    BrokenRecord,
    class_of,
    decode_both,
    decode_image,
    jpeg_region,
    jpeg_size,
)
from supmim_jax.data.sampler import NONE
from supmim_jax.data.token_cache import TokenCache

UNITS = 255  # of an image's height or width
WHOLE = (0, 0, UNITS, UNITS)
CENTRE = (64, 64, 191, 191)  # half the height and width, as near as 255ths come (SimCCrop)

cv2.setNumThreads(0)  # parallelism is over images


class Crop(NamedTuple):
    """Resizes an image to `extent`, then `box` of that to image_size, and may mirror it."""

    extent: tuple[int, int]  # height, width
    box: Box
    mirrored: bool


def draw_crop(
    height: int, width: int, cfg: DataConfig, rng: Generator, bounds: Sequence[int] | None = None
) -> Crop:
    """The crop of an image of height x width pixels, as config.data.crop says.

    Contrastive crops with boxes "heat_map" are around `bounds`, a row of a table of boxes. With
    None, as before such boxes are found, they are inception crops.
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


# What follows takes uint8 images HxWxC and, with how="nearest", masks HxW; "" is what
# config.data.resize says.


def cropped(image: np.ndarray, crop: Crop, cfg: DataConfig, how: str = "") -> np.ndarray:
    """The crop of an image, image_size x image_size."""
    part = crop.box.of(resize(image, *crop.extent, how or cfg.resize))
    return finished(part, crop, cfg, how)


def finished(part: np.ndarray, crop: Crop, cfg: DataConfig, how: str = "") -> np.ndarray:
    """The finished crop, from the pixels in its box."""
    part = resize(part, cfg.image_size, cfg.image_size, how or cfg.resize)
    if crop.mirrored:
        part = cv2.flip(part, 1).reshape(part.shape)
    return np.ascontiguousarray(part)


def whole_image(image: np.ndarray, cfg: DataConfig) -> np.ndarray:
    """All of the image, whatever its aspect: uint8 image_size x image_size x C."""
    return resize(image, cfg.image_size, cfg.image_size, cfg.resize)


def eval_image(image: np.ndarray, cfg: DataConfig, how: str = "") -> np.ndarray:
    """Shorter side to eval_resize, then the centre crop, image_size x image_size."""
    extent = _with_shorter_side(image.shape[:2], cfg.eval_resize)
    image = resize(image, *extent, how or cfg.resize)
    top, left = ((side - cfg.image_size) // 2 for side in extent)
    return np.ascontiguousarray(Box(top, left, cfg.image_size, cfg.image_size).of(image))


def _with_shorter_side(extent: tuple[int, int], size: int) -> tuple[int, int]:
    """Height and width of about the same aspect, the shorter one of this size."""
    scale = size / min(extent)
    return max(round(extent[0] * scale), size), max(round(extent[1] * scale), size)


def resize(image: np.ndarray, height: int, width: int, how: str = "area") -> np.ndarray:
    """The image or mask in another size.

    "area": pixel-area average of sides that shrink, then bicubic for those that grow. "linear":
    bilinear without smoothing, as TensorFlow's default, unless a side shrinks to less than half;
    then as "area". "nearest": each pixel is one of the old, so that classes are not mixed.
    """
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    steps = [(smaller, cv2.INTER_AREA), ((height, width), cv2.INTER_CUBIC)]
    if how == "linear" and image.shape[0] <= 2 * height and image.shape[1] <= 2 * width:
        steps = [((height, width), cv2.INTER_LINEAR)]
    if how == "nearest":
        steps = [((height, width), cv2.INTER_NEAREST_EXACT)]
    for size, method in steps:
        if image.shape[:2] != size:
            shape = *size, *image.shape[2:]  # OpenCV drops a single channel
            image = cv2.resize(image, size[::-1], interpolation=method).reshape(shape)
    return image


GEOMETRY, COLOURS = 0, 1  # streams of an example's random numbers


def generator(seed: int, number: int, example: int, stream: int, crop: int = 0) -> Generator:
    """The generator of an example's GEOMETRY in a view, or of its COLOURS in an epoch (`number`).

    `crop` is 0 or 1, the first or the second crop that the step sees of the image.
    """
    return Generator(Philox(key=[seed, example], counter=[0, crop, stream, number]))


def decoded_crops(
    record: dict,
    cfg: DataConfig,
    example: int,
    rngs: Sequence[Generator],
    bounds: Sequence[int] | None = None,
) -> list[np.ndarray]:
    """A random crop of the record's image by each generator.

    The image is decoded once; of a JPEG with one crop only that part, if possible.
    """
    drawn = []
    if len(rngs) == 1 and cfg.channels == 3 and (shape := jpeg_size(record["image"])):
        crop = draw_crop(*shape, cfg, rngs[0], bounds)
        part = jpeg_region(record["image"], crop.box, shape) if crop.extent == shape else None
        if part is not None:
            return [finished(part, crop, cfg)]
        drawn = [crop]  # the generator is not asked again
    image = decode_image(record, cfg, example)
    drawn = drawn or [draw_crop(*image.shape[:2], cfg, rng, bounds) for rng in rngs]
    return [cropped(image, crop, cfg) for crop in drawn]


def moved(image: np.ndarray, cfg: DataConfig, rng: Generator) -> tuple[np.ndarray, int]:
    """A crop after the operations that move pixels, and how many of colour are left to do."""
    if not cfg.moves_pixels:
        return image, 0
    return augment.geometry(cfg.augment, image, cfg.augment_layers, cfg.augment_magnitude, rng)


def coloured(
    view: np.ndarray,
    layers: int,
    cfg: DataConfig,
    seed: int,
    epoch: int,
    example: int,
    crop: int = 0,
) -> np.ndarray:
    """The view with colour augmentation, which moves no pixel, and random erasing."""
    if cfg.augment == "none" and not cfg.erasing:
        return view
    rng = generator(seed, epoch, example, COLOURS, crop)
    if cfg.moves_pixels:
        view = augment.colours(cfg.augment, view, layers, cfg.augment_magnitude, rng)
    elif cfg.augment == "three_augment":
        view = augment.three_augment(view, cfg.color_jitter, rng)
    elif cfg.augment == "color_jitter":
        view = augment.jittered(view, cfg.color_jitter, rng)
    return augment.erased(view, cfg.erasing, rng)


@dataclass(frozen=True, eq=False)
class TrainExample:
    """Grain transform: (epoch, id, record) to one augmented example.

    Of two crops the first is "image", bit for bit what it is alone, and the other "second_image".
    Worker processes get copies of the boxes, 5 MB for the 1.28 million records of ImageNet-1k.
    """

    cfg: DataConfig
    seed: int
    views: int  # that an image's geometry cycles through
    with_target: bool = False  # also the view before colour augmentation
    tokens: TokenCache | None = None
    crops: int = 1  # of an image that a step sees, 1 or 2
    boxes: np.ndarray | None = None  # a table with every record's

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        epoch, example, record = drawn
        view = epoch % self.views
        targets = self.targets(view, example, record)
        images = [
            coloured(target, layers, self.cfg, self.seed, epoch, example, crop)
            for crop, (target, layers) in enumerate(targets)
        ]
        fields = packed(images[0], class_of(record, self.cfg, example), example, 1.0)
        if self.crops == 2:
            fields["second_image"] = images[1]
        if self.with_target:
            fields["target"] = targets[0][0]
        if self.tokens is not None:
            fields["tokens"] = self.tokens.read(view, example, record["image"])
        return fields

    def targets(self, view: int, example: int, record: dict) -> list[tuple[np.ndarray, int]]:
        """For each crop, the image that tokens are computed of, and the later colour operations."""
        rngs = [generator(self.seed, view, example, GEOMETRY, i) for i in range(self.crops)]
        bounds = None if self.boxes is None else self.boxes[example]
        crops = decoded_crops(record, self.cfg, example, rngs, bounds)
        return [moved(crop, self.cfg, rng) for crop, rng in zip(crops, rngs)]


@dataclass(frozen=True)
class TargetExample:
    """Grain transform: (view, id, record) to the image whose tokens a cache holds, and its mark."""

    example: TrainExample

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        mark = np.uint32(source.mark(drawn[2]["image"]))
        return {"image": self.example.targets(*drawn)[0][0], "mark": mark}


@dataclass(frozen=True)
class EvalExample:
    """Grain transform: (id, record) to one example.

    A broken image counts, as a grey one with "broken" its id. Of None as the record (padding, or
    nothing could be read) the example has weight 0.
    """

    cfg: DataConfig
    view: Callable[[np.ndarray, DataConfig], np.ndarray] = eval_image  # of the decoded image

    def __call__(self, drawn: tuple[int, dict | None]) -> dict:
        example, record = drawn
        image, label, broken = grey_image(self.cfg), 0, example
        if record is not None:
            label = class_of(record, self.cfg, example)
            with contextlib.suppress(BrokenRecord):
                image, broken = self.view(decode_image(record, self.cfg, example), self.cfg), NONE
        fields = packed(image, label, example, float(record is not None))
        return fields | {"broken": np.int32(broken)}


@dataclass(frozen=True)
class MaskedTrainExample:
    """Grain transform: (epoch, id, record with a mask) to one augmented example without a label."""

    cfg: DataConfig
    seed: int

    def __call__(self, drawn: tuple[int, int, dict]) -> dict:
        epoch, example, record = drawn
        image, mask = decode_both(record, self.cfg, example)
        crop = draw_crop(*mask.shape, self.cfg, generator(self.seed, epoch, example, GEOMETRY))
        image = coloured(cropped(image, crop, self.cfg), 0, self.cfg, self.seed, epoch, example)
        masks = cropped(mask, crop, self.cfg, "nearest")
        return packed(image, 0, example, 1.0) | {"masks": masks.astype(np.int32)}


@dataclass(frozen=True)
class MaskedExample:
    """Grain transform: (id, record with a mask) to one example without a label; see EvalExample."""

    cfg: DataConfig

    def __call__(self, drawn: tuple[int, dict | None]) -> dict:
        example, record = drawn
        image, broken = grey_image(self.cfg), example
        mask = np.full(image.shape[:2], IGNORED)
        if record is not None:
            with contextlib.suppress(BrokenRecord):
                image, mask = decode_both(record, self.cfg, example)
                image, mask = eval_image(image, self.cfg), eval_image(mask, self.cfg, "nearest")
                broken = NONE
        fields = packed(image, 0, example, float(record is not None))
        return fields | {"masks": mask.astype(np.int32), "broken": np.int32(broken)}


def grey_image(cfg: DataConfig) -> np.ndarray:
    """The stand-in for an undecodable image where no other image may replace it."""
    return np.full((cfg.image_size, cfg.image_size, cfg.channels), 128, np.uint8)


def packed(image: np.ndarray, label: int, example: int, weight: float) -> dict:
    """The fields of a Batch for one example."""
    return {
        "image": image,
        "label": np.int32(label),
        "weight": np.float32(weight),
        "id": np.int32(example),
    }
