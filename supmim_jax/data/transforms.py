"""From a record to the uint8 image that the encoder sees: numpy and OpenCV only.

An example's image is a function of (seed, view, epoch, id): its geometry of (seed, view, id), its
colours of (seed, epoch, id); where a step sees two crops of an image, also of which of them it is.
Contrastive crops follow a table of boxes, too. A masked-token target is of the geometry alone, so
that the tokens of a view can be computed once, before training.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator, Philox

from supmim_jax.config import IGNORED, DataConfig
from supmim_jax.data import augment, jpeg, source
from supmim_jax.data.crops import cropped, cropped_mask, draw_crop, eval_image, eval_mask, finished
from supmim_jax.data.decode import BrokenRecord, class_of, decode_both, decode_image
from supmim_jax.data.sampler import NONE
from supmim_jax.data.token_cache import TokenCache

GEOMETRY, COLOURS = 0, 1  # streams of an example's random numbers


def generator(seed: int, number: int, example: int, stream: int, crop: int = 0) -> Generator:
    """The generator of one example's geometry in a view, or of its colours in an epoch.

    Args:
      seed: the run's.
      number: the view, or the epoch.
      example: its id.
      stream: GEOMETRY or COLOURS.
      crop: 0 or 1, the first or the second crop that the step sees of the image.
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
    if len(rngs) == 1 and cfg.channels == 3 and (shape := jpeg.size(record["image"])):
        crop = draw_crop(*shape, cfg, rngs[0], bounds)
        part = jpeg.region(record["image"], crop.box, shape) if crop.extent == shape else None
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
    boxes: np.ndarray | None = None  # of every record, a table as in crops.py

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
        """Of each crop, what tokens are computed of, and the colour operations that follow."""
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
        masks = cropped_mask(mask, crop, self.cfg.image_size)
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
                image, mask = eval_image(image, self.cfg), eval_mask(mask, self.cfg)
                broken = NONE
        fields = packed(image, 0, example, float(record is not None))
        return fields | {"masks": mask.astype(np.int32), "broken": np.int32(broken)}


def grey_image(cfg: DataConfig) -> np.ndarray:
    """What stands for an image that cannot be decoded, where another may not."""
    return np.full((cfg.image_size, cfg.image_size, cfg.channels), 128, np.uint8)


def packed(image: np.ndarray, label: int, example: int, weight: float) -> dict:
    """The fields of a Batch, of one example."""
    return {
        "image": image,
        "label": np.int32(label),
        "weight": np.float32(weight),
        "id": np.int32(example),
    }
