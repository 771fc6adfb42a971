"""A trained encoder in Python: images in, embeddings, patch tokens or names of classes out.

import supmim_jax
encoder = supmim_jax.load("runs/b14@best")
embeddings_NxD = encoder.embed("photos")
"""

import io
import itertools
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from supmim_jax import encoder as programs
from supmim_jax import import_weights, sharding, storage, workdir
from supmim_jax.batch import Features
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, MeshConfig, changed
from supmim_jax.data import decode
from supmim_jax.data.transforms import eval_image
from supmim_jax.data.worker import prefetched
from supmim_jax.errors import SetupError, first_few
from supmim_jax.formats import files

BATCH_SIZE = 256
IN_FLIGHT = 2  # batches that the devices have to do while the host makes the next


class BrokenImage(SetupError):
    """An image that cannot be read; the message names it."""


def load(
    location: str | os.PathLike,
    devices: Sequence[jax.Device] | None = None,
    max_value: float = 0.0,
) -> "Encoder":
    """The encoder of a training run, or one that `supmim_jax.export` wrote.

    Args:
      location: `workdir`, `workdir@step` or `workdir@best` (with `@ema` behind it the run must have
        a moving average; where it has one, that is used in any case), local or gs://, of a run on
        any mesh; or a directory with config.json and model.safetensors.
      devices: what to compute on; default: all of this process.
      max_value: the value that is white in images of more than 8 bits a channel, such as 65535;
        default: that of the run, if it has one. Without any, such images are refused.

    Returns:
      The encoder; of a checkpoint every file was compared with its SHA-256.

    Raises:
      SetupError: there is no such checkpoint, it is damaged, or leaves no encoder.
    """
    if not 0 <= max_value < np.inf:
        raise SetupError(f"max_value is {max_value}; it must be 0 (not known) or more.")
    text = os.fspath(location)
    path = storage.location(text, searched=False)
    mesh = sharding.make_mesh(MeshConfig(), devices or jax.local_devices())
    if (path / files.WEIGHTS).exists():
        with storage.fetched(path) as local:
            cfg, params, names = import_weights.load("", local)
        program = programs.build_encoder(cfg, mesh.size, mesh)
        bound = program.bind(sharding.put(params, program.params))
    else:
        checkpoint = Checkpoint.open(text)
        cfg, path = checkpoint.config, checkpoint.directory
        if cfg.objective.leaves == "tokenizer":
            raise SetupError(
                f"{text} is of objective {cfg.objective.name!r}, which leaves a tokenizer and no "
                f"encoder. Give the --workdir of another run."
            )
        bound = programs.restore(checkpoint, mesh, mesh.size)
        of_classes = cfg.objective.leaves == "classifier"
        names = workdir.class_names(checkpoint.workdir) if of_classes else ()
    cfg = changed(cfg, data={"max_value": max_value or cfg.data.max_value})
    return Encoder(cfg, bound, names, mesh, str(path))


class Encoder:
    """A ViT with its weights, and the head that was trained with it.

    Images may be paths (local or gs://), one folder (all image files below it, by path), PIL
    images, or uint8 arrays HxW or HxWxC of any size. They are prepared as the evaluations of the
    run have them: turned as EXIF says, over white where transparent (config.data.background),
    the shorter side to config.data.eval_resize, the centre cut out.

    Attributes:
      config: of the run.
      class_names: those of the classifier's outputs, in order; () without a classifier.
      location: the directory that it was read from.
    """

    def __init__(
        self,
        cfg: Config,
        bound: programs.BoundEncoder,
        names: Sequence[str],
        mesh: jax.sharding.Mesh,
        location: str,
    ):
        self.config, self.mesh, self.location = cfg, mesh, location
        self._bound, self.params = bound, bound.params
        classes = cfg.data.num_classes if cfg.objective.leaves == "classifier" else 0
        known = len(names) == classes
        self.class_names = tuple(names) if known else tuple(f"class {i}" for i in range(classes))

    def features(self, images_BxHxWxC: jax.Array) -> Features:
        """What the network makes of prepared images; may be called inside jax.jit.

        Args:
          images_BxHxWxC: uint8, as from `preprocess`; B is a multiple of the number of devices.

        Returns:
          Features: pooled float32 BxD; tokens float32 BxhxwxD on the grid of patches; logits
          float32 BxV with a classifier, else None.

        Raises:
          SetupError: the array is of another shape or dtype.
        """
        data, found = self.config.data, np.shape(images_BxHxWxC)
        expected = (data.image_size, data.image_size, data.channels)
        dtype = getattr(images_BxHxWxC, "dtype", None)
        if len(found) != 4 or found[1:] != expected or dtype != np.uint8:
            raise SetupError(
                f"features takes uint8 images of shape (images, "
                f"{', '.join(map(str, expected))}), as `preprocess` gives them; found is {dtype} "
                f"of shape {found}."
            )
        return self._bound.features(images_BxHxWxC)

    def embed(self, images: Any, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The images' embeddings, float32 NxD: the CLS token or the mean over patches.

        Raises:
          SetupError: there are none, or one cannot be read, which is named.
        """
        return self._joined(images, batch_size, lambda features: features.pooled)

    def tokens(self, images: Any, batch_size: int = BATCH_SIZE) -> np.ndarray:
        """The normalised patch tokens, float32 NxhxwxD; raises SetupError as `embed`."""
        return self._joined(images, batch_size, lambda features: features.tokens)

    def predict(
        self, images: Any, top: int = 5, batch_size: int = BATCH_SIZE
    ) -> list[list[tuple[str, float]]]:
        """For each image its likeliest classes: names and probabilities, the likeliest first.

        Probabilities are those of a softmax; of a head that was trained with a sigmoid loss, which
        scores each class by itself, they are a sigmoid's.

        Raises:
          SetupError: the run trained no classifier, or as `embed`.
        """
        if not self.class_names:
            raise SetupError(
                f"This run's objective, {self.config.objective.name!r}, trained no classifier: "
                f"there is nothing to predict. Take `embed`, or another run."
            )
        _check_count("top", top)
        softmax = self.config.objective.classification.loss == "softmax"
        to_probability = jax.nn.softmax if softmax else jax.nn.sigmoid
        rows = self._joined(images, batch_size, lambda features: to_probability(features.logits))
        best = np.argsort(-rows, axis=1, kind="stable")[:, :top]
        return [
            [(self.class_names[i], float(row[i])) for i in order] for row, order in zip(rows, best)
        ]

    def preprocess(self, image: Any) -> np.ndarray:
        """One image as the network takes it, uint8 HxWxC, as the run's evaluations prepare it.

        Raises:
          BrokenImage: it cannot be read.
        """
        name = image if isinstance(image, (str, os.PathLike)) else type(image).__name__
        return self.prepared(_encoded(image), str(name))

    def prepared(self, encoded: bytes, name: str, floats: bool = False) -> np.ndarray:
        """`preprocess` of the bytes of a file; `floats` as in decode.Shown.

        Raises:
          BrokenImage: they are no image; the message begins with `name`.
        """
        data = self.config.data
        setting = "max_value (of supmim_jax.load, or --max_value)"
        shown = decode.Shown(data.background, data.max_value, floats, setting)
        try:
            pixels = decode.pixels(encoded, data.channels, shown)
        except decode.Unclear as error:
            raise BrokenImage(f"{name} {error}") from None
        if pixels is None:
            raise BrokenImage(f"{name} {decode.fault(encoded)}.")
        return eval_image(pixels, data)

    def batches(
        self, images: Iterable[np.ndarray], batch_size: int
    ) -> Iterator[tuple[int, Features]]:
        """Features of prepared images on the devices, in batches: how many rows count, and them.

        The devices have IN_FLIGHT batches to do while the caller handles one.
        """
        devices = self.mesh.size
        size = -(-batch_size // devices) * devices
        layout = jax.NamedSharding(self.mesh, sharding.BATCH)
        pending, images = deque(), iter(images)
        for number in itertools.count():
            if not (rows := list(itertools.islice(images, size))):
                break
            # Fewer images than a batch would have: a power of two, so that few programs do.
            if number == 0:
                each = 1 << (-(-len(rows) // devices) - 1).bit_length()
                size = min(size, each * devices)
            batch = np.zeros((size, *rows[0].shape), np.uint8)
            batch[: len(rows)] = rows
            pending.append((len(rows), self.features(jax.device_put(batch, layout))))
            if len(pending) > IN_FLIGHT:
                yield pending.popleft()
        yield from pending

    def _joined(
        self, images: Any, batch_size: int, take: Callable[[Features], jax.Array]
    ) -> np.ndarray:
        _check_count("batch_size", batch_size)
        prepared = prefetched(self.preprocess, _listed(images))
        return np.concatenate(
            [np.asarray(take(x))[:count] for count, x in self.batches(prepared, batch_size)]
        )


def _check_count(name: str, value: Any) -> None:
    if not isinstance(value, int | np.integer) or value < 1:
        raise SetupError(f"{name} is {value!r}; it must be a whole number, 1 or more.")


def _listed(images: Any) -> list:
    """The single images of what a user gives: see `Encoder`."""
    if isinstance(images, (str, os.PathLike)):
        path = storage.location(images, searched=False)
        return [path / x for x in image_files(path)] if path.is_dir() else [images]
    if hasattr(images, "getexif"):  # PIL
        return [images]
    if hasattr(images, "ndim"):  # an array, of one image or of several
        images = np.asarray(images)
        images = images if images.ndim == 4 else [images]
    if not isinstance(images, Iterable):
        raise SetupError(
            f"Images are given as {type(images).__name__}; expected are paths, a folder, PIL "
            f"images or uint8 arrays."
        )
    if not (images := list(images)):
        raise SetupError("No images were given.")
    return images


def image_files(folder: epath.Path) -> list[str]:
    """The image files below a folder by their relative paths, in order.

    Hidden files are left out, and others whose names do not end as images' do, with a warning.

    Raises:
      SetupError: there are none.
    """
    if not folder.is_dir():
        raise SetupError(f"{folder} is no directory. Give a folder with images.")
    shown = [x for x in storage.files(folder) if not x.rpartition("/")[2].startswith(".")]
    names = [name for name in shown if name.lower().endswith(decode.ENDINGS)]
    if not names:
        raise SetupError(
            f"{folder} has no image files: none of its names ends in {', '.join(decode.ENDINGS)}."
        )
    if others := sorted(set(shown) - set(names)):
        message = f"{folder}: left out, as no images by name: {first_few(others)}"
        warnings.warn(message, stacklevel=2)
    return names


def _encoded(image: Any) -> bytes:
    """The bytes of a file with the image: what is no file is written as PNG, which loses nothing.

    So arrays and PIL images are prepared by the one code that prepares files.
    """
    if isinstance(image, (str, os.PathLike)):
        try:
            return storage.location(image, searched=False).read_bytes()
        except OSError as error:
            raise BrokenImage(f"{image} cannot be read: {error}.") from None
    from PIL import Image, ImageOps

    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[..., 0]
        shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
        if array.dtype != np.uint8 or not array.size or not shaped:
            numbers = array.size and np.issubdtype(array.dtype, np.number)
            values = f" with values from {array.min():g} to {array.max():g}" if numbers else ""
            raise BrokenImage(
                f"An image is an array of {array.dtype} of shape {array.shape}{values}; expected "
                f"is uint8 from 0 to 255, height x width, or with 1, 3 (RGB) or 4 (RGB and alpha) "
                f"channels behind. Of floats from 0 to 1: (255 * images).round().astype('uint8')."
            )
        image = Image.fromarray(np.ascontiguousarray(array))
    if image.mode in ("CMYK", "YCbCr", "HSV"):  # what PNG does not have
        image = image.convert("RGB")
    file = io.BytesIO()
    try:
        ImageOps.exif_transpose(image).save(file, "PNG", compress_level=1)
    except OSError as error:
        raise BrokenImage(
            f"A PIL image of mode {image.mode!r} cannot be prepared: {error}. Convert it to one of "
            f"mode L, RGB or RGBA."
        ) from None
    return file.getvalue()
