"""From the bytes of a record to an image and the classes of its pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from supmim_jax.config import IGNORED, DataConfig, SetupError
from supmim_jax.data import header

# What is wrong with a file is said by those who asked for it.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


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


class Unclear(Exception):
    """An image whose values mean what it does not say: what it has, and what to do about it."""

    def __init__(self, found: str, cure: str):
        super().__init__(f"{found}. {cure}")
        self.found, self.cure = found, cure


@dataclass(frozen=True)
class Shown:
    """How images are shown, where a file leaves it open."""

    background: Sequence[int] = (255, 255, 255)  # what is seen where it is transparent, RGB
    max_value: float = 0.0  # white, where a channel has more than 8 bits; 0: nobody said
    floats: bool = False  # one channel of float32, whose bytes tfds stores as four channels
    setting: str = "config.data.max_value"  # where that value is set


def decode_image(record: dict, cfg: DataConfig, example: int) -> np.ndarray:
    """uint8 HxWxC (RGB or grey) from JPEG, PNG or any format of OpenCV, as a person sees it.

    Raises:
      BrokenRecord: the bytes are no image; the message says which record they are.
      SetupError: only config.data can say what is seen, and does not.
    """
    encoded, name = record["image"], f"{cfg.name} record {example}"
    shown = Shown(cfg.background, cfg.max_value, record.get("floats", False))
    try:
        image = pixels(encoded, cfg.channels, shown)
    except Unclear as error:
        raise SetupError(f"{name}: 'image' {error}") from None
    if image is None:
        raise BrokenRecord(f"{name}: 'image', {len(encoded)} bytes, {header.fault(encoded)}.")
    return image


def pixels(encoded: bytes, channels: int, shown: Shown = Shown()) -> np.ndarray | None:
    """uint8 HxWxC of an encoded image: turned as its EXIF says, in 8 bits, over the background.

    None where it cannot be decoded.

    Raises:
      Unclear: it has more than 8 bits and nobody said what is white; or values above that; or an
        alpha channel of a form that is not read.
    """
    head = header.read(encoded)
    if head is not None and head.unread:
        raise Unclear(f"is a {head.kind} with {head.unread}, which is not read", "Save it as PNG.")
    plain = _plain(head)
    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    image = _decoded(encoded, colour if plain else cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if not plain:
        image = _over(*_split(image, head, shown.floats), head, shown)
        if image.shape[2] != channels:
            to = cv2.COLOR_RGB2GRAY if channels == 1 else cv2.COLOR_GRAY2RGB
            image = cv2.cvtColor(image, to)
    image = image.reshape(*image.shape[:2], channels)
    return np.ascontiguousarray(_turned(image, head))


def is_plain(encoded: bytes) -> bool:
    """Whether nothing of `Shown` matters to an encoded image: opaque, 8 bits a channel."""
    return _plain(header.read(encoded))


def nobody_said(found: str, shown: Shown) -> Unclear:
    return Unclear(
        f"{found}, and nothing says which of them is white",
        f"Set {shown.setting} to that: 65535 for photographs of 16 bits, 4095 for data of 12 bits, "
        f"1 for floats from 0 to 1.",
    )


def _plain(head: header.Header | None) -> bool:
    return head is not None and head.bits <= 8 and not head.alpha and head.white in (0, 255)


def _decoded(encoded: bytes, flag: int) -> np.ndarray | None:
    """As it is stored: `_turned` is to follow, for images and masks alike."""
    try:
        flag |= cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flag) if encoded else None
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"No memory to decode an image: {error}") from None
        return None  # its header asks for more pixels than supmim_jax/__init__.py allows


def _turned(image: np.ndarray, head: header.Header | None) -> np.ndarray:
    """The image as EXIF has it shown; of a TIFF the decoder has done it."""
    if head is None or head.kind == "TIFF":
        return image
    return turned(image, head.orientation)


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """HxW or HxWxC as stored, the way it is shown by EXIF's orientation, 1 to 8."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image[:, ::-1] if orientation in (2, 3, 6, 7) else image


def _split(
    raw: np.ndarray, head: header.Header | None, floats: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours HxWxC (RGB or grey) and alpha HxW in [0, 1] of what IMREAD_UNCHANGED decodes."""
    raw = raw if raw.ndim == 3 else raw[..., None]
    colours = raw[..., 2::-1] if raw.shape[2] > 2 else raw[..., :1]
    if floats and raw.shape[2] == 4 and raw.dtype == np.uint8:
        return np.concatenate([colours, raw[..., 3:]], axis=2).view("<f4"), None
    if raw.shape[2] == 4:
        return colours, raw[..., 3] / np.float32(_full(raw.dtype))
    if head is not None and head.key is not None:  # OpenCV leaves it out of grey images alone
        key = head.key * (255 // (2**head.bits - 1) if head.bits < 8 else 1)
        return colours, (colours[..., 0] != key).astype(np.float32)
    return colours, None


def _full(kind: np.dtype) -> int:
    """The value of whole opacity, or of white."""
    return np.iinfo(kind).max if kind.kind in "iu" else 1


def _over(
    colours: np.ndarray, alpha: np.ndarray | None, head: header.Header | None, shown: Shown
) -> np.ndarray:
    """uint8 HxWxC: the colours in 8 bits, over the background."""
    white = (head.white if head is not None else 0) or shown.max_value
    if colours.dtype != np.uint8 and not white:
        raise nobody_said(f"has values of {colours.dtype} up to {colours.max()}", shown)
    if colours.dtype != np.uint8 or (head is not None and head.white):
        low, high = colours.min(), colours.max()
        if not 0 <= low <= high <= white:  # nor NaN
            raise Unclear(
                f"has values of {colours.dtype} from {low} to {high}, of which 0 is black and "
                f"{white:g} white",
                f"Set {shown.setting} to the value that is white.",
            )
        colours = colours * (255.0 / white)
    if alpha is None or (alpha == 1).all():
        return colours if colours.dtype == np.uint8 else np.rint(colours).astype(np.uint8)
    times = alpha if head is None or head.kind != "TIFF" else 1  # there the decoder has multiplied
    over = [
        np.rint(np.minimum(colours[..., i % colours.shape[2]] * times + (1 - alpha) * value, 255))
        for i, value in enumerate(shown.background)
    ]
    return np.stack(over, axis=2).astype(np.uint8)


def _drawn(
    encoded: bytes, shape: tuple[int, int], cfg: DataConfig, name: str, orientation: int
) -> np.ndarray:
    """The values HxW of a mask, as its image is shown; see `decode_mask`."""
    head, raw = header.read(encoded), _decoded(encoded, cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise BrokenRecord(f"{name}: the mask, {len(encoded)} bytes, {header.fault(encoded)}.")
    colours, alpha = _split(raw, head)
    if (head and head.unread) or (alpha is not None and ((alpha > 0) & (alpha < 1)).any()):
        raise SetupError(
            f"{name}: the mask in {cfg.masks.field!r} is half transparent, or has an alpha channel "
            f"that is not read: a mixture of two classes is none. Save the masks without it."
        )
    value = colours[..., 0]
    if alpha is not None:
        seen = cfg.background[0] * (_full(value.dtype) // 255)
        value = np.where(alpha == 0, seen, value)
    drawn = _turned(value, head)
    if head is not None and head.orientation != 1:
        orientation = 1  # it is turned already
    other = turned(drawn, orientation)
    mask, other = (other, drawn) if cfg.masks.drawn_on == "stored" else (drawn, other)
    if mask.shape == shape:
        return mask
    advice = "Name the feature with the masks in config.data.masks.field."
    if other.shape == shape:
        fits = "shown" if cfg.masks.drawn_on == "stored" else "stored"
        advice = (
            f"EXIF turns the image, and the mask fits it as it is {fits}: set "
            f"config.data.masks.drawn_on={fits!r} if all of them do."
        )
    raise SetupError(f"{name}: the mask has {mask.shape} pixels, but its image {shape}. {advice}")


def decode_mask(
    record: dict, shape: tuple[int, int], cfg: DataConfig, example: int, orientation: int = 1
) -> np.ndarray:
    """int16 HxW: the class of each pixel of the image, or IGNORED; of a colour mask, of its red.

    A mask that EXIF does not turn itself is of the image as it is stored, and turned with it; with
    config.data.masks.drawn_on = "shown", of the image as it is shown. Where it is transparent, it
    has the background's red.

    Args:
      record: with the encoded "mask".
      shape: of the image as it is shown.
      cfg: says what its values mean.
      example: the record's id.
      orientation: of the image, EXIF's.

    Raises:
      BrokenRecord: the bytes are no image.
      SetupError: it is an image of another size than `shape`, or of other classes.
    """
    masks, name = cfg.masks, f"{cfg.name} record {example}"
    mask = _drawn(record["mask"], shape, cfg, name, orientation)
    raw = mask.astype(np.int32)
    classes = np.where(raw == masks.ignore, IGNORED, raw + masks.offset)
    wrong = mask[
        (raw != mask) | ((raw != masks.ignore) & ((classes < 0) | (classes >= masks.num_classes)))
    ]
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
    head = header.read(record["image"])
    return image, decode_mask(
        record, image.shape[:2], cfg, example, head.orientation if head is not None else 1
    )
