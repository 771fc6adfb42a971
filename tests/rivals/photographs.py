"""Made-up photographs with the size, spectrum and file length of ImageNet's, as a tfds data set."""

import functools
import io
from collections.abc import Iterator

import cv2
import numpy as np
import tensorflow_datasets as tfds

HEIGHT, WIDTH = 375, 500  # ImageNet's most frequent size
QUALITY = 95
CLASSES = 1000
SHAPES = 12  # most objects of an image
TEXTURES = 6
COLOUR = np.float32(0.25)  # share of a texture that differs between red, green and blue


class Photographs(tfds.core.GeneratorBasedBuilder):
    """JPEGs of 500x375, quality 95, 4:2:0; `image` and `label`, in one split."""

    VERSION = tfds.core.Version("1.0.0")  # goes up with every change to what is drawn

    def __init__(self, images: int = 0, seed: int = 0, **options):
        """`images` and `seed` matter only when the data set is made."""
        self.images, self.seed = images, seed
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
            "label": tfds.features.ClassLabel(num_classes=CLASSES),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.images} images, seed {self.seed}.",
            features=tfds.features.FeaturesDict(features),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Iterator]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict]]:
        for index in range(self.images):
            encoded = io.BytesIO(jpeg(self.seed, index))
            yield index, {"image": encoded, "label": index % CLASSES}


def prepare(directory: str, images: int, seed: int) -> int:
    """Makes the data set in `directory` unless it is there; the number of images that it has."""
    options = {"data_dir": directory, "file_format": "array_record"}
    builder = Photographs(images=images, seed=seed, **options)
    tfds.disable_progress_bar()
    builder.download_and_prepare()
    return builder.info.splits["train"].num_examples


def jpeg(seed: int, index: int) -> bytes:
    """The file of one image, a function of both numbers."""
    options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
    options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420]
    return cv2.imencode(".jpg", draw(seed, index), options)[1].tobytes()


def draw(seed: int, index: int) -> np.ndarray:
    """uint8 HEIGHTxWIDTHx3: a ground and objects in front of it, all textured, with edges."""
    random = np.random.default_rng([seed, index])
    image = _surface(random, HEIGHT, WIDTH)
    for _ in range(random.integers(2, SHAPES)):
        height, width = random.integers((30, 40), (HEIGHT, WIDTH))
        top, left = random.integers(HEIGHT - height + 1), random.integers(WIDTH - width + 1)
        angles = np.sort(random.uniform(0, 2 * np.pi, random.integers(3, 12)))
        corners = np.stack([1 + np.cos(angles), 1 + np.sin(angles)], 1) * (width / 2, height / 2)
        mask = np.zeros((height, width), np.uint8)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 255, cv2.LINE_AA)
        part = image[top : top + height, left : left + width]
        part += (mask[..., None] * np.float32(1 / 255)) * (_surface(random, height, width) - part)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


def _surface(random: np.random.Generator, height: int, width: int) -> np.ndarray:
    """float32 height x width x 3: a part of a texture around a colour of its own."""
    textures = _textures()
    texture = textures[random.integers(len(textures))]
    top = random.integers(texture.shape[0] - height + 1)
    left = random.integers(texture.shape[1] - width + 1)
    mean = random.uniform(40, 215, 3).astype(np.float32)
    return (
        mean
        + np.float32(random.uniform(30, 105)) * texture[top : top + height, left : left + width]
    )


@functools.cache
def _textures() -> list[np.ndarray]:
    """float32 2 HEIGHT x 2 WIDTH x 3 each, deviation about 1: noise of every scale.

    Amplitude falls as a power of frequency and most of it is grey, as in photographs (Field 1987,
    "Relations between the statistics of natural images and the response properties of cortical
    cells": about 1/f, which is equal strength in every octave).
    """
    shape, random = (2 * WIDTH, 2 * HEIGHT), np.random.default_rng(0)
    found = []
    for falling in np.linspace(-0.1, 0.7, TEXTURES):
        texture = np.zeros((*shape[::-1], 3), np.float32)
        for octave in range(10):
            cells = 2 << octave
            noise = random.standard_normal((cells, cells, 3), np.float32)
            noise = COLOUR * noise + (1 - COLOUR) * noise[..., :1]
            smooth = cv2.resize(noise, shape, interpolation=cv2.INTER_CUBIC)
            texture += np.float32(2.0 ** (-falling * octave)) * smooth
        found.append(texture / texture.std())
    return found
