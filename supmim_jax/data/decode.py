"""From the bytes of a record to an image and the classes of its pixels."""

import cv2
import numpy as np

from supmim_jax.config import IGNORED, DataConfig, SetupError


def class_of(record: dict, cfg: DataConfig, example: int) -> int:
    """The record's label.

    Raises:
      SetupError: it is none of the classes.
    """
    label = int(record["label"])
    if not 0 <= label < cfg.num_classes:
        raise SetupError(
            f"{cfg.name} record {example} has {cfg.label_field!r} = {label}, expected 0 to "
            f"{cfg.num_classes - 1} (config.data.num_classes). Set that, or mend the data set."
        )
    return label


class BrokenRecord(Exception):
    """A record that cannot be read or has no image; training goes on without it."""


def decode_image(record: dict, cfg: DataConfig, example: int) -> np.ndarray:
    """uint8 HxWxC (RGB or grey) from JPEG, PNG or any format of OpenCV.

    Raises:
      BrokenRecord: the bytes are no image; the message says which record they are.
    """
    image = pixels(record["image"], cfg.channels)
    if image is None:
        raise BrokenRecord(
            f"{cfg.name} record {example}: {len(record['image'])} bytes are not an image that can "
            f"be decoded."
        )
    return image


def pixels(encoded: bytes, channels: int) -> np.ndarray | None:
    """uint8 HxWxC of an encoded image; None where it cannot be decoded."""
    image = _decoded(encoded, cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB)
    return None if image is None else image.reshape(*image.shape[:2], channels)


def _decoded(encoded: bytes, flag: int) -> np.ndarray | None:
    try:
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flag) if encoded else None
    except cv2.error:  # its header asks for more pixels than supmim_jax/__init__.py allows
        return None


def decode_mask(record: dict, shape: tuple[int, int], cfg: DataConfig, example: int) -> np.ndarray:
    """int16 HxW: the class of each pixel of the image, or IGNORED; of a colour mask, of its red.

    Raises:
      BrokenRecord: the bytes are no image.
      SetupError: it is an image of another size than `shape`, or of other classes.
    """
    encoded, masks, name = record["mask"], cfg.masks, f"{cfg.name} record {example}"
    mask = _decoded(encoded, cv2.IMREAD_UNCHANGED)
    if mask is None:
        raise BrokenRecord(f"{name}: the mask is {len(encoded)} bytes that cannot be decoded.")
    if mask.shape[:2] != shape:
        raise SetupError(
            f"{name}: the mask has {mask.shape[:2]} pixels, but its image {shape}. Name the "
            f"feature with the masks in config.data.masks.field."
        )
    raw = (mask if mask.ndim == 2 else mask[..., 2]).astype(np.int32)  # OpenCV: blue, green, red
    classes = np.where(raw == masks.ignore, IGNORED, raw + masks.offset)
    wrong = raw[(raw != masks.ignore) & ((classes < 0) | (classes >= masks.num_classes))]
    if wrong.size:
        raise SetupError(
            f"{name}: config.data.masks has num_classes={masks.num_classes}, "
            f"offset={masks.offset} and ignore={masks.ignore}, but {masks.field!r} has pixels of "
            f"{np.unique(wrong)[:8].tolist()}; expected are {-masks.offset} to "
            f"{masks.num_classes - 1 - masks.offset}."
        )
    return classes.astype(np.int16)


def decode_both(record: dict, cfg: DataConfig, example: int) -> tuple[np.ndarray, np.ndarray]:
    """The image uint8 HxWxC and the classes of its pixels int16 HxW."""
    image = decode_image(record, cfg, example)
    return image, decode_mask(record, image.shape[:2], cfg, example)
