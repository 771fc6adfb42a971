"""Formula-driven images: the built-in tfds data set `fractals`, with nothing to download.

In the manner of FractalDB (Kataoka et al., "Pre-training without Natural Images", ACCV 2020): a
class is a random iterated function system, an example a perturbed rendering of it.

An image is a pure function of (seed, split, class, instance), from which its random generator is
keyed: the same bits in any batch and with any number of processes. Record i has id i and label
i % num_classes, so that every prefix of a split is balanced.

A system is 2 to MAX_MAPS contractive maps (a b c d e f): x' = a x + b y + e, y' = c x + d y + f.
Arithmetic is + - * / in float64, element by element, so a figure does not depend on its batch.
In names of shapes M stands for MAX_MAPS, T for the steps of the chaos game, C for its chains.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from numpy.typing import NDArray

from supmim_jax import storage
from supmim_jax.data import worker

MAX_MAPS = 4
MAX_STRETCH = 0.8  # of a map; with entries off by 15 % it contracts: 0.8 (1 + 0.15 sqrt 2) < 1
CHAINS, BURN_IN = 64, 8  # of the chaos game: chains side by side, first steps thrown away
RASTER = 32  # pixels: the figures of the classes are judged and compared at this size
FILL = (0.12, 0.45)  # the share of the raster that a figure may cover
MAX_OVERLAP = 0.6  # intersection over union of the rasters, between any two classes
CANDIDATES, ATTEMPTS = 16, 1000  # systems tried at once, and how often, before a class is given up

Array = NDArray[np.float64]


def generator(seed: int, stream: int, label: int, instance: int) -> np.random.Generator:
    """A generator of its own for every class and image: its 128-bit key is their address."""
    key = seed << 64 | stream << 56 | label << 32 | instance
    return np.random.Generator(np.random.Philox(key=key))


def turn(half_tangent: Array) -> tuple[Array, Array]:
    """Cosine and sine of 2 atan(half_tangent). Being rational, the same bits on any machine."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def chaos_game(maps_BxMx6: Array, choices_BxN: NDArray[np.integer]) -> tuple[Array, Array]:
    """Points on B attractors: x and y, TxBxC each, where N = (T + BURN_IN) * C.

    The choices say which map moves a point; all chains start at the fixed point of map 0, which
    is on the attractor.
    """
    batch = len(maps_BxMx6)
    index_TxBxC = choices_BxN.reshape(batch, -1, CHAINS).transpose(1, 0, 2).astype(np.intp)
    index_TxBxC += MAX_MAPS * np.arange(batch)[:, None]
    table = np.ascontiguousarray(maps_BxMx6.reshape(-1, 6).T)
    a, b, c, d, e, f = maps_BxMx6[:, 0].T[..., None]
    determinant = (1 - a) * (1 - d) - b * c
    x, y = (e * (1 - d) + b * f) / determinant, (f * (1 - a) + c * e) / determinant
    xs, ys = np.empty((2, *index_TxBxC.shape))
    for step, index_BxC in enumerate(index_TxBxC):
        a, b, c, d, e, f = table.take(index_BxC, axis=1)
        x, y = a * x + b * y + e, c * x + d * y + f
        xs[step], ys[step] = x, y
    return xs[BURN_IN:], ys[BURN_IN:]


def rasterise(xs: Array, ys: Array, size: int, scale_B: Array, shift_2xB: Array) -> NDArray:
    """Points per pixel, int64 BxHxW, of points TxBxC.

    The figure's longer side becomes scale * size pixels; a shift (x, y) of -1 or 1 moves it to the
    edge of the image.
    """
    low = np.stack([xs.min((0, 2)), ys.min((0, 2))])
    high = np.stack([xs.max((0, 2)), ys.max((0, 2))])
    pixels_B = scale_B * size / (high - low).max(0)
    offset_2xB = (size + shift_2xB * (1 - scale_B) * size - (low + high) * pixels_B) / 2
    column, row = (
        np.clip((points * pixels_B[:, None] + offset_B[:, None]).astype(np.intp), 0, size - 1)
        for points, offset_B in zip((xs, ys), offset_2xB)
    )
    batch = len(scale_B)
    flat = (np.arange(batch)[:, None] * size + row) * size + column
    return np.bincount(flat.ravel(), minlength=batch * size**2).reshape(batch, size, size)


def _candidates(random: np.random.Generator) -> tuple[Array, NDArray[np.uint8], NDArray[np.bool_]]:
    """Random systems: maps BxMx6, the map that each byte stands for Bx256, which of them contract.

    Drawn as rotation, signed singular values s1 >= s2, rotation. Good-looking systems of n maps
    have a sum of s1 + 2 s2 between (5 + n) / 2 and (6 + n) / 2 (Anderson & Farrell, WACV 2022).
    A map is chosen with a probability proportional to |s1 s2|, and at least about 2 %.
    """
    count = int(random.integers(2, MAX_MAPS + 1))
    singular = np.sort(random.random((2, CANDIDATES, count)), axis=0)[::-1]
    wanted = (5 + count + random.random(CANDIDATES)) / 2
    singular = singular * (wanted / (singular[0] + 2 * singular[1]).sum(-1))[:, None]
    s1, s2 = singular * random.choice((-1.0, 1.0), singular.shape)
    cos1, sin1 = turn(random.uniform(-1, 1, s1.shape))
    cos2, sin2 = turn(random.uniform(-1, 1, s1.shape))
    a, b = cos1 * s1 * cos2 - sin1 * s2 * sin2, -cos1 * s1 * sin2 - sin1 * s2 * cos2
    c, d = sin1 * s1 * cos2 + cos1 * s2 * sin2, -sin1 * s1 * sin2 + cos1 * s2 * cos2
    e, f = random.uniform(-1, 1, singular.shape)
    maps_BxMx6 = np.zeros((CANDIDATES, MAX_MAPS, 6))
    maps_BxMx6[:, :count] = np.stack([a, b, c, d, e, f], axis=-1)
    area = np.abs(s1 * s2)
    limits = np.cumsum(area + 0.02 * area.sum(-1, keepdims=True), axis=-1)
    limits_Bx1xM = (limits / limits[:, -1:])[:, None, :]
    lookup_Bx256 = ((np.arange(256)[:, None] + 0.5) / 256 > limits_Bx1xM).sum(-1).astype(np.uint8)
    return maps_BxMx6, lookup_Bx256, singular[0].max(-1) < MAX_STRETCH


@functools.lru_cache(maxsize=8)
def class_systems(num_classes: int, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """The systems of all classes: maps NxMx6, and the map that each byte stands for, Nx256.

    Figures that cover too little or too much, or that resemble an earlier class, are drawn again.
    Class i depends on the classes before it alone. Raises ValueError if no further one is found.
    """
    maps_NxMx6 = np.empty((num_classes, MAX_MAPS, 6))
    lookup_Nx256 = np.empty((num_classes, 256), np.uint8)
    accepted = np.zeros((num_classes, RASTER**2 // 64), np.uint64)
    for label in range(num_classes):
        for attempt in range(ATTEMPTS):
            random = generator(seed, 0, label, attempt)
            maps_BxMx6, lookup_Bx256, good = _candidates(random)
            draws_BxN = random.integers(0, 256, (CANDIDATES, RASTER**2 + BURN_IN * CHAINS))
            points = chaos_game(maps_BxMx6, np.take_along_axis(lookup_Bx256, draws_BxN, axis=1))
            hits = rasterise(*points, RASTER, np.ones(CANDIDATES), np.zeros((2, CANDIDATES)))
            # The pixels that the upright figures cover, 64 to a word.
            figures = np.packbits(hits.reshape(CANDIDATES, -1) > 0, axis=-1).view(np.uint64)
            covered = np.bitwise_count(figures).sum(-1) / RASTER**2
            good &= (FILL[0] < covered) & (covered < FILL[1])
            common = np.bitwise_count(figures[:, None] & accepted).sum(-1)
            union = np.bitwise_count(figures[:, None] | accepted).sum(-1)
            good &= (common / union).max(-1) < MAX_OVERLAP
            if good.any():
                first = good.argmax()
                maps_NxMx6[label], lookup_Nx256[label] = maps_BxMx6[first], lookup_Bx256[first]
                accepted[label] = figures[first]
                break
        else:
            raise ValueError(f"Seed {seed}: no figure found that differs from the {label} before.")
    return maps_NxMx6, lookup_Nx256


SPLITS = ("train", "validation", "test")
JITTER = 0.15  # every entry of a map varies by this share between the images of a class
MAX_TURN = 0.2679491924311227  # tan 15°: half an angle, for rotations by up to 30° either way
SCALE = (0.65, 0.95)  # the figure's longer side, as a share of the image's
GROUND = {1: 0.1, 3: 0.45}  # brightness that the ground may reach, by number of channels
FIGURE = {1: 0.9, 3: 0.7}  # least brightness of a figure where its points are dense
CHUNK = 32  # images rendered at once: the working set of the chaos game stays in cache
PARALLEL_FROM = 4000  # images in a split above which starting processes pays


@dataclasses.dataclass(frozen=True)
class Spec:
    """All that determines the images. One channel means a bright figure on dark ground."""

    name: str
    description: str
    num_classes: int
    size: int  # pixels, height and width
    channels: int  # 1 grey, 3 RGB
    per_class: tuple[int, int, int]  # images in train, validation and test
    seed: int  # another one gives other classes and images
    encoding: str = "png"  # of the image; "jpeg" has quality 95
    negatives: bool = False  # every other image has dark and bright exchanged

    def num_examples(self, split: str) -> int:
        return self.num_classes * dict(zip(SPLITS, self.per_class))[split]


SPECS = {
    "tiny": Spec("tiny", "Few labels, small machine", 30, 24, 1, (8, 40, 40), seed=0),
    "tiny_fresh": Spec("tiny_fresh", "To confirm choices made on tiny", 30, 24, 1, (8, 40, 40), 1),
    "tiny_colour": Spec("tiny_colour", "Colour says nothing", 30, 24, 3, (20, 40, 40), seed=0),
    "small": Spec("small", "Some minutes of training", 50, 64, 3, (200, 20, 20), 2, negatives=True),
    "base": Spec("base", "The shape of ImageNet", 1000, 224, 3, (100, 10, 10), 3, "jpeg", True),
}


def _draw(spec: Spec, split: str, label: int, instance: int) -> tuple[NDArray, ...]:
    """All randomness of one image: 44 uniform numbers, the maps to apply, texture and noise."""
    random = generator(spec.seed, 1 + SPLITS.index(split), label, instance)
    uniform = random.random(44)
    points = max(2048, spec.size**2 // CHAINS * CHAINS)  # about one per pixel
    draws_N = random.integers(0, 256, points + BURN_IN * CHAINS, np.uint8)
    choices_N = class_systems(spec.num_classes, spec.seed)[1][label][draws_N]
    size, method = (spec.size, spec.size), cv2.INTER_LINEAR_EXACT
    grids = [random.integers(0, 256, (cells, cells), np.uint8) // 2 for cells in (3, 8)]
    texture_HxW = sum(cv2.resize(grid, size, interpolation=method) for grid in grids)
    return uniform, choices_N, texture_HxW, random.integers(0, 256, size, np.uint8)


def _paint(hits: NDArray, uniform_Bx5x3: NDArray, texture: NDArray, noise: NDArray, spec: Spec):
    """Images, uint8 BxHxWxC, from three BxHxW arrays: points per pixel, texture and noise.

    A ground textured between two colours; on it a figure of a third, brightest where points are
    dense. Colours say nothing of the class. Arithmetic is in float32.
    """
    channels, dark, bright = spec.channels, GROUND[spec.channels], FIGURE[spec.channels]
    colour = uniform_Bx5x3.astype(np.float32)[:, :, None, None, :]
    first, second, figure = (colour[:, i, ..., :channels] for i in range(3))
    brightness, negative = colour[:, 3, ..., :1], colour[:, 4, ..., :1] < 0.5
    figure = 0.2 + 0.8 * figure
    figure *= (bright + (1 - bright) * brightness) / figure.max(-1, keepdims=True)
    texture, noise = (part[..., None] / np.float32(255) for part in (texture, noise))
    ground = dark * (first + (second - first) * texture)
    inside = hits[..., None] > 0
    mean = hits.sum((1, 2))[:, None, None, None] / inside.sum((1, 2), keepdims=True)
    shade = (1 - 0.45 * mean / (hits[..., None] + mean)).astype(np.float32)
    image = np.where(inside, figure * shade, ground) + np.float32(0.16) * (noise - np.float32(0.5))
    image = (np.clip(image, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return np.where(negative & spec.negatives, 255 - image, image)


def render(spec: Spec, split: str, ids: Sequence[int]) -> dict[str, NDArray]:
    """The examples of these ids: image uint8 NxHxWxC, segmentation uint16 NxHxW, label int64 N.

    The segmentation is label + 1 on the figure and 0 around it.
    """
    instance_B, label_B = np.divmod(np.asarray(ids, np.int64), spec.num_classes)
    draws = [_draw(spec, split, int(c), int(i)) for c, i in zip(label_B, instance_B)]
    uniform, choices_BxN, texture, noise = (np.stack(parts) for parts in zip(*draws))
    jitter_BxMx6 = 2 * uniform[:, :24].reshape(-1, MAX_MAPS, 6) - 1
    turn_B, flip_B, scale_B, *shift = uniform[:, 24:29].T

    maps_BxMx6 = class_systems(spec.num_classes, spec.seed)[0][label_B]
    xs, ys = chaos_game(maps_BxMx6 * (1 + JITTER * jitter_BxMx6), choices_BxN)
    xs *= np.where(flip_B < 0.5, -1, 1)[:, None]
    cos, sin = (part[:, None] for part in turn(MAX_TURN * (2 * turn_B - 1)))
    xs, ys = cos * xs - sin * ys, sin * xs + cos * ys
    scale_B = SCALE[0] + (SCALE[1] - SCALE[0]) * scale_B
    hits = rasterise(xs, ys, spec.size, scale_B, 2 * np.stack(shift) - 1)
    return {
        "image": _paint(hits, uniform[:, 29:].reshape(-1, 5, 3), texture, noise, spec),
        "segmentation": ((hits > 0) * (label_B[:, None, None] + 1)).astype(np.uint16),
        "label": label_B,
    }


def _encode(spec: Spec, split: str, start: int) -> list[tuple[bytes, bytes]]:
    """Image and segmentation files of the chunk of examples that starts here."""
    arrays = render(spec, split, range(start, min(start + CHUNK, spec.num_examples(split))))
    fast, best = [cv2.IMWRITE_PNG_COMPRESSION, 1], [cv2.IMWRITE_JPEG_QUALITY, 95]
    suffix, options = {"png": (".png", fast), "jpeg": (".jpg", best)}[spec.encoding]
    images = (cv2.imencode(suffix, rgb[..., ::-1], options)[1] for rgb in arrays["image"])
    masks = (cv2.imencode(".png", mask, fast)[1] for mask in arrays["segmentation"])
    return [(image.tobytes(), mask.tobytes()) for image, mask in zip(images, masks)]


class FractalsConfig(tfds.core.BuilderConfig):
    """tfds mutates its configs; what determines the images is the frozen `spec`."""

    def __init__(self, spec: Spec):
        shape = f"{spec.size} px, {spec.channels} channels, {spec.num_classes} classes"
        super().__init__(name=spec.name, description=f"{spec.description}: {shape}.")
        self.spec = spec


class Fractals(tfds.core.GeneratorBasedBuilder):
    """Random iterated function systems, rendered in random poses and colours, with masks."""

    VERSION = tfds.core.Version("1.1.0")  # goes up with every change to what is rendered
    BUILDER_CONFIGS = [FractalsConfig(spec) for spec in SPECS.values()]

    def _info(self) -> tfds.core.DatasetInfo:
        spec, of = self.builder_config.spec, tfds.features
        square = (spec.size, spec.size)
        mask = {"dtype": np.uint16, "doc": "Label + 1 on the figure, 0 around it."}
        features = {
            "id": of.Scalar(np.int64, doc="Index within the split."),
            "image": of.Image(shape=(*square, spec.channels), encoding_format=spec.encoding),
            "label": of.ClassLabel(num_classes=spec.num_classes),
            "segmentation": of.Image(shape=(*square, 1), encoding_format="png", **mask),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=Fractals.__doc__,
            homepage="https://hirokatsukataoka16.github.io/Pretraining-without-Natural-Images/",
            features=of.FeaturesDict(features),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict]]:
        spec = self.builder_config.spec
        total, processes = spec.num_examples(split), os.cpu_count() or 1
        encode, starts = functools.partial(_encode, spec, split), range(0, total, CHUNK)
        if total > PARALLEL_FROM and processes > 1:
            worker.keep_light()  # or they would import the script of this one, and JAX with it
            spawn = multiprocessing.get_context("spawn")
            pool = concurrent.futures.ProcessPoolExecutor(processes, spawn)
            chunks = worker.prefetched(encode, starts, pool)
        else:
            chunks = map(encode, starts)
        for index, (image, mask) in enumerate(pair for chunk in chunks for pair in chunk):
            files = {"image": io.BytesIO(image), "segmentation": io.BytesIO(mask)}
            yield index, {"id": index, "label": index % spec.num_classes, **files}


def prepare(config_name: str, data_dir: str = "") -> Fractals:
    """The builder of a config; generates its data on first use, under data_dir or tfds's default.

    tfds writes to a directory of another name, renamed at the end, so that half-written data are
    never taken for complete. Raises ValueError for an unknown name.
    """
    if config_name not in SPECS:
        raise ValueError(f"No fractals config {config_name!r}; known are {', '.join(SPECS)}.")
    make = functools.partial(Fractals, config=config_name, file_format="array_record")
    builder = make(data_dir=data_dir or None)
    final = epath.Path(builder.data_path)
    with contextlib.redirect_stdout(sys.stderr):  # tfds tells there what it does
        if storage.is_local(final):
            # Where another process was faster, its files are the same.
            with contextlib.suppress(FileExistsError):
                builder.download_and_prepare()
        elif not (final / "dataset_info.json").exists():
            storage.make_directory(final)
            with tempfile.TemporaryDirectory(prefix="supmim_jax_") as local:
                made = make(data_dir=local)
                made.download_and_prepare()
                storage.upload_all(epath.Path(made.data_path), final, last="dataset_info.json")
    return make(data_dir=data_dir or None)
