"""Folders and data sets for the tests of preparation; what they are made of."""

import io
import struct
import zlib

import cv2
import numpy as np
import tensorflow_datasets as tfds

from supmim_jax.config import DataConfig
from supmim_jax.data import source as source_module

CLASSES = ("ape", "bee", "cow")
WNIDS = ("n01440764", "n01443537", "n01484850")


def encoded(seed: int, ending: str = ".png", size: int = 24) -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return cv2.imencode(ending, noise)[1].tobytes()


def png(side: int, rows: bytes, bits: int = 8, more: tuple = ()) -> bytes:
    """A square grey PNG of these rows, if they are all there; `more` are chunks (name, body)."""
    head = struct.pack(">IIBBBBB", side, side, bits, 0, 0, 0, 0)
    file = b"\x89PNG\r\n\x1a\n"
    chunks = (b"IHDR", head), *more, (b"IDAT", zlib.compress(rows, 1)), (b"IEND", b"")
    for name, body in chunks:
        checksum = struct.pack(">I", zlib.crc32(name + body))
        file += struct.pack(">I", len(body)) + name + body + checksum
    return file


def put(path, content: bytes | str = b"") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def contents(root) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() else b"/"
        for path in sorted(root.rglob("*"))
    }


def source(data_dir, name="beasts", split="train", **changes):
    cfg = DataConfig(name=name, data_dir=str(data_dir), num_classes=3, **changes)
    return source_module.Source(cfg).records(split)


def store(name, features, splits, data_dir) -> None:
    """Writes a data set of these (key, example) in their order, as tfds does."""
    tfds.dataset_builders.store_as_tfds_dataset(
        name,
        "1.0.0",
        tfds.features.FeaturesDict(features),
        splits,
        data_dir=data_dir,
        file_format="array_record",
        disable_shuffling=True,
    )


def raw(builder_dir, split) -> list[bytes]:
    found = tfds.builder_from_directory(builder_dir).as_data_source(
        split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
    )
    return [found[i] for i in range(len(found))]


class ToyPictures(tfds.core.GeneratorBasedBuilder):
    """A small data set, as tfds's catalogue has larger ones."""

    VERSION = tfds.core.Version("2.3.4")
    MANUAL_DOWNLOAD_INSTRUCTIONS = None

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.ClassLabel(names=CLASSES),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(23), "test": self._generate_examples(7)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"image": io.BytesIO(encoded(i)), "label": i % 3}


class ManualPictures(ToyPictures):
    """Made of files that the user must bring."""

    MANUAL_DOWNLOAD_INSTRUCTIONS = "Ask the zoo for\n  beasts.zip."


def flip(path, at: int) -> None:
    found = bytearray(path.read_bytes())
    found[at] ^= 1
    path.write_bytes(bytes(found))
