"""Decodes the bytes of a record to an image, or to the class of each pixel.

OpenCV does the decoding, but it reports none of size, depth, alpha and orientation, and silently
drops some of them. So we read a file's header first, and from it decide whether to ask OpenCV for
plain colour or for everything in the file. If OpenCV decodes nothing, the header tells what is
wrong with the file.

Pillow does not read the headers for us because it hides the depth of colour PNGs, decodes a whole
PNG to look for EXIF, and refuses TIFFs that OpenCV reads.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import re
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import cv2
import numpy as np

import supmim_jax
from supmim_jax.config import IGNORED, DataConfig
from supmim_jax.errors import SetupError

MOST_SIDE = 2**20  # pixels; OpenCV's own limit to a side
# Of the names of files of all formats that are read; what a file is, its first bytes say.
ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
# Tags of TIFF, and so of EXIF.
WIDTH, HEIGHT, BITS, COLOURS, ORIENTATION, SAMPLES, EXTRA = 256, 257, 258, 262, 274, 277, 338

# OpenCV would print what is wrong with a file; whoever asked for it says so.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


class BrokenRecord(Exception):
    """A record that cannot be read or has no image; training goes on without it."""


class Unclear(Exception):
    """An image that does not say what its values mean; holds what was found and the cure."""

    def __init__(self, found: str, cure: str):
        super().__init__(f"{found}. {cure}")
        self.found, self.cure = found, cure


@dataclass(frozen=True)
class Shown:
    """How to show images where a file does not say so."""

    background: Sequence[int] = (255, 255, 255)  # what is seen where it is transparent, RGB
    max_value: float = 0.0  # white, where a channel has more than 8 bits; 0: nobody said
    floats: bool = False  # one channel of float32, whose bytes tfds stores as four channels
    setting: str = "config.data.max_value"  # where that value is set


@dataclass(frozen=True, slots=True)
class Header:
    """What a file's header says; the defaults stand for a damaged header."""

    kind: str = ""  # a name in FORMATS
    height: int = 0  # pixels as they are stored
    width: int = 0
    bits: int = 0  # of a channel
    alpha: bool = False  # or perhaps: of a GIF only decoding tells
    orientation: int = 1  # 1 to 8, as EXIF counts: how it is to be turned when it is shown
    whole: bool = True  # whether its end is there
    white: int = 0  # the value that is white, where the file says that
    key: int | None = None  # of a grey PNG, the value that is transparent
    unread: str = ""  # what it has that OpenCV's decoder drops

    @property
    def plain(self) -> bool:
        """Whether nothing of `Shown` matters: opaque, and 8 bits a channel or less."""
        return bool(self.kind) and self.bits <= 8 and not self.alpha and self.white in (0, 255)

    def shown(self, stored: np.ndarray) -> np.ndarray:
        """A decoded image as EXIF has it shown; of a TIFF the decoder has turned it already."""
        return stored if self.kind == "TIFF" else turned(stored, self.orientation)


def kind(encoded: bytes) -> str:
    """The format of a file, by its first bytes; "" for an unknown one."""
    matches = (name for name, (magic, _) in FORMATS.items() if re.match(magic, encoded, re.DOTALL))
    return next(matches, "")


def read(encoded: bytes) -> Header:
    """The header of a file or of its beginning; `Header()` if it is damaged or unknown."""
    try:
        return FORMATS[kind(encoded)][1](encoded)
    except (LookupError, ValueError, struct.error):
        return Header()


def fault(encoded: bytes) -> str:
    """What is wrong with a file that cannot be decoded, as far as its header tells."""
    if not encoded:
        return "is empty"
    if not kind(encoded):
        return f"begins with {encoded[:4].hex(' ')}, which is none of {', '.join(FORMATS)}"
    header = read(encoded)
    if not header.kind:
        return f"cannot be decoded: the header of a {kind(encoded)} is cut or damaged"
    size, area = f"{header.width} x {header.height}", header.width * header.height
    if area > supmim_jax.MOST_PIXELS:
        return (
            f"has {size} = {area} pixels, more than the {supmim_jax.MOST_PIXELS} that are decoded: "
            f"set OPENCV_IO_MAX_IMAGE_PIXELS in the environment, here and for training"
        )
    if max(header.height, header.width) > MOST_SIDE:
        return f"has {size} pixels, more than {MOST_SIDE} on a side"
    if not header.whole:
        return "cannot be decoded: it is cut, its end is missing"
    if header.kind == "JPEG" and header.bits != 8:
        return f"cannot be decoded: a JPEG of {header.bits} bits a channel"
    return f"cannot be decoded: it is damaged or cut, behind a sound header ({size} pixels)"


def _jpeg(encoded: bytes) -> Header:
    at, orientation, frame = 2, 1, None
    while encoded[at : at + 2] != b"\xff\xda":  # the scan, which ends the header
        if encoded[at] != 0xFF:
            raise ValueError("no marker")
        marker = encoded[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = int.from_bytes(encoded[at + 2 : at + 4])
        body = encoded[at + 4 : at + 2 + length]
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _orientation(body[6:])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = body
        at += 2 + max(length, 2)
    bits, height, width = struct.unpack(">BHH", (frame or b"")[:5])
    whole = encoded.rfind(b"\xff\xd9") > at
    return Header("JPEG", height, width, bits, orientation=orientation, whole=whole)


def _png(encoded: bytes) -> Header:
    width, height, bits, colours = struct.unpack(">IIBB", encoded[16:26])
    alpha, key, orientation, whole = bool(colours & 4), None, 1, False
    at = 8
    while not whole and at + 8 <= len(encoded):
        length, name = struct.unpack_from(">I4s", encoded, at)
        body, whole = encoded[at + 8 : at + 8 + length], name == b"IEND"
        if name == b"tRNS":
            alpha, key = True, None if colours else int.from_bytes(body[:2])
        elif name == b"eXIf":
            orientation = _orientation(body)
        at += 12 + length
    return Header("PNG", height, width, bits, alpha, orientation, whole, key=key)


def _webp(encoded: bytes) -> Header:
    size, alpha, orientation, at = None, False, 1, 12
    while at + 8 <= len(encoded):
        name, length = struct.unpack_from("<4sI", encoded, at)
        body = encoded[at + 8 : at + 8 + length]
        if name == b"VP8X":
            alpha = bool(body[0] & 0x10)
            size = [1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7)]
        elif name == b"VP8 " and not size:
            size = [side & 0x3FFF for side in struct.unpack("<HH", body[6:10])]
        elif name == b"VP8L":
            fields = int.from_bytes(body[1:5], "little")
            alpha = alpha or bool(fields >> 28 & 1)
            size = size or [1 + (fields & 0x3FFF), 1 + (fields >> 14 & 0x3FFF)]
        elif name == b"EXIF":
            orientation = _orientation(body.removeprefix(b"Exif\0\0"))
        at += 8 + length + length % 2
    width, height = size or ()
    whole = len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    return Header("WebP", height, width, 8, alpha, orientation, whole)


def _gif(encoded: bytes) -> Header:
    width, height = struct.unpack("<HH", encoded[6:10])
    return Header("GIF", height, width, 8, True, whole=encoded.rstrip(b"\0").endswith(b";"))


def _bmp(encoded: bytes) -> Header:
    size, dib, width, height = struct.unpack("<I8xIii", encoded[2:26])
    bits, form = struct.unpack("<HI", encoded[28:34])
    unread = "an alpha channel" if form in (3, 6) and dib >= 56 and any(encoded[66:70]) else ""
    whole = len(encoded) >= size
    return Header("BMP", abs(height), width, min(bits, 8), whole=whole, unread=unread)


def _tiff(encoded: bytes) -> Header:
    tags = _tags(encoded)
    bits, (colours,) = max(tags.get(BITS, [1])), tags.get(COLOURS, [1])[:1]
    channels = {2: 3, 5: 4, 6: 3, 8: 3}.get(colours, 1)
    extra = tags.get(SAMPLES, [1])[0] - channels
    # libtiff brings these to RGBA, times alpha. Of others OpenCV drops the alpha or keeps it raw.
    known = channels == 3 and bits == 8 and tags.get(EXTRA) in ((1,), (2,))
    unread = "" if known or extra <= 0 else "an alpha channel"
    if bits > 8 and tags.get(COLOURS) == (0,):
        unread = "a scale on which 0 is white"
    (height, *_), (width, *_) = tags[HEIGHT], tags[WIDTH]
    orientation = tags.get(ORIENTATION, [1])[0]
    return Header("TIFF", height, width, bits, extra > 0, orientation, unread=unread)


def _pnm(encoded: bytes) -> Header:
    words: list[bytes] = []
    for line in encoded[2:1024].split(b"\n"):
        words += line.partition(b"#")[0].split()[: 3 - len(words)]
    width, height = int(words[0]), int(words[1])
    white = 0 if encoded[1:2] in b"14" else int(words[2])
    return Header("PNM", height, width, white.bit_length() or 1, white=white)


FORMATS = {  # by name: how a file begins, and what parses its header
    "JPEG": (rb"\xff\xd8\xff", _jpeg),
    "PNG": (rb"\x89PNG\r\n\x1a\n", _png),
    "GIF": (rb"GIF8", _gif),
    "BMP": (rb"BM", _bmp),
    "TIFF": (rb"II\*\0|MM\0\*", _tiff),
    "PNM": (rb"P[1-6][ \t\n\r]", _pnm),
    "WebP": (rb"RIFF....WEBP", _webp),
}


def _orientation(exif: bytes) -> int:
    """The orientation in an image's EXIF; 1, not rotated, if the EXIF is damaged."""
    try:
        (orientation, *_) = _tags(exif)[ORIENTATION]
    except (LookupError, ValueError, struct.error):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _tags(encoded: bytes) -> dict[int, tuple[int, ...]]:
    """The integers in the first directory of a TIFF file, by tag; EXIF is such a file."""
    order = {b"II": "<", b"MM": ">"}[encoded[:2]]
    (start,) = struct.unpack_from(f"{order}I", encoded, 4)
    (count,) = struct.unpack_from(f"{order}H", encoded, start)
    tags = {}
    for at in range(start + 2, start + 2 + 12 * count, 12):
        tag, kind, number = struct.unpack_from(f"{order}HHI", encoded, at)
        if kind not in (3, 4) or not 0 < number <= 16:  # 16 or 32 bits each
            continue
        form, place = f"{order}{number}{'HI'[kind - 3]}", at + 8
        if struct.calcsize(form) > 4:  # more than has room in the entry
            (place,) = struct.unpack_from(f"{order}I", encoded, place)
        tags[tag] = struct.unpack_from(form, encoded, place)
    return tags


def class_of(record: dict, cfg: DataConfig, example: int) -> int:
    """The record's label; raises SetupError if it is none of the classes."""
    label = int(record["label"])
    if not 0 <= label < cfg.num_classes:
        raise SetupError(
            f"{cfg.name} record {example} has {cfg.label_field!r} = {label}, expected 0 to "
            f"{cfg.num_classes - 1} (config.data.num_classes). Set that, or mend the data set."
        )
    return label


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
        raise BrokenRecord(f"{name}: 'image', {len(encoded)} bytes, {fault(encoded)}.")
    return image


def pixels(encoded: bytes, channels: int, shown: Shown = Shown()) -> np.ndarray | None:
    """uint8 HxWxC of an encoded image: turned as its EXIF says, in 8 bits, over the background.

    None where it cannot be decoded.

    Raises:
      Unclear: it has more than 8 bits and nobody said what is white; or values above that; or an
        alpha channel of a form that is not read.
    """
    header = read(encoded)
    if header.unread:
        raise Unclear(f"is a {header.kind} with {header.unread}, which is not read", "Save as PNG.")
    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    image = _decoded(encoded, colour if header.plain else cv2.IMREAD_UNCHANGED)
    if image is None:
        return None
    if not header.plain:
        image = _composed(image, header, shown)
        if image.shape[2] != channels:
            to = cv2.COLOR_RGB2GRAY if channels == 1 else cv2.COLOR_GRAY2RGB
            image = cv2.cvtColor(image, to)
    return np.ascontiguousarray(header.shown(image.reshape(*image.shape[:2], channels)))


def nobody_said(found: str, shown: Shown) -> Unclear:
    return Unclear(
        f"{found}, and nothing says which of them is white",
        f"Set {shown.setting} to that: 65535 for photographs of 16 bits, 4095 for data of 12 bits, "
        f"1 for floats from 0 to 1.",
    )


def _decoded(encoded: bytes, flag: int) -> np.ndarray | None:
    """The image as it is stored: `Header.shown` turns images and masks alike."""
    try:
        flag |= cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(encoded, np.uint8), flag) if encoded else None
    except cv2.error as error:
        if error.code == cv2.Error.StsNoMem:
            raise MemoryError(f"No memory to decode an image: {error}") from None
        return None  # its header asks for more pixels than supmim_jax/__init__.py allows


def turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates HxW or HxWxC as stored, to EXIF's orientation 1 to 8."""
    if orientation >= 5:
        image = image.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return image[:, ::-1] if orientation in (2, 3, 6, 7) else image


def _split(
    raw: np.ndarray, header: Header, floats: bool = False
) -> tuple[np.ndarray, np.ndarray | None]:
    """Colours HxWxC (RGB or grey) and alpha HxW in [0, 1] of what IMREAD_UNCHANGED decodes."""
    raw = raw if raw.ndim == 3 else raw[..., None]
    colours = raw[..., 2::-1] if raw.shape[2] > 2 else raw[..., :1]
    if floats and raw.shape[2] == 4 and raw.dtype == np.uint8:
        return np.concatenate([colours, raw[..., 3:]], axis=2).view("<f4"), None
    if raw.shape[2] == 4:
        opaque = np.iinfo(raw.dtype).max if raw.dtype.kind in "iu" else 1
        return colours, raw[..., 3] / np.float32(opaque)
    if header.key is not None:  # OpenCV leaves it out of grey images alone
        key = header.key * (255 // (2**header.bits - 1) if header.bits < 8 else 1)
        return colours, (colours[..., 0] != key).astype(np.float32)
    return colours, None


def _composed(raw: np.ndarray, header: Header, shown: Shown) -> np.ndarray:
    """uint8 HxWxC of what IMREAD_UNCHANGED decodes: colours in 8 bits, over the background."""
    colours, alpha = _split(raw, header, shown.floats)
    white = header.white or shown.max_value
    if colours.dtype != np.uint8 and not white:
        raise nobody_said(f"has values of {colours.dtype} up to {colours.max()}", shown)
    if colours.dtype != np.uint8 or header.white:
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
    times = 1 if header.kind == "TIFF" else alpha  # of a TIFF the decoder has multiplied
    over = [
        np.rint(np.minimum(colours[..., i % colours.shape[2]] * times + (1 - alpha) * value, 255))
        for i, value in enumerate(shown.background)
    ]
    return np.stack(over, axis=2).astype(np.uint8)


def _mask_values(
    encoded: bytes, shape: tuple[int, int], cfg: DataConfig, name: str, orientation: int
) -> np.ndarray:
    """The values HxW of a mask, as its image is shown; see `decode_mask`."""
    header, raw = read(encoded), _decoded(encoded, cv2.IMREAD_UNCHANGED)
    if raw is None:
        raise BrokenRecord(f"{name}: the mask, {len(encoded)} bytes, {fault(encoded)}.")
    colours, alpha = _split(raw, header)
    if header.unread or (alpha is not None and ((alpha > 0) & (alpha < 1)).any()):
        raise SetupError(
            f"{name}: the mask in {cfg.masks.field!r} is half transparent, or has an alpha channel "
            f"that is not read: a mixture of two classes is none. Save the masks without it."
        )
    values = colours[..., 0]
    if alpha is not None:
        scale = 257 if values.dtype == np.uint16 else 1
        values = np.where(alpha == 0, cfg.background[0] * scale, values)
    own = header.shown(values)
    # EXIF of the image turns the mask too, unless EXIF of the mask has done so.
    moved = turned(own, orientation) if header.orientation == 1 else own
    fits = {"shown": own, "stored": moved}
    mask = fits.pop(cfg.masks.drawn_on)
    if mask.shape == shape:
        return mask
    ((other, values),) = fits.items()
    advice = "Name the feature with the masks in config.data.masks.field."
    if values.shape == shape:
        advice = (
            f"EXIF turns the image, and the mask fits it as it is {other}: set "
            f"config.data.masks.drawn_on={other!r} if all of them do."
        )
    raise SetupError(f"{name}: the mask has {mask.shape} pixels, but its image {shape}. {advice}")


def decode_mask(
    record: dict, shape: tuple[int, int], cfg: DataConfig, example: int, orientation: int = 1
) -> np.ndarray:
    """int16 HxW: the class of each pixel of the image, or IGNORED; of a colour mask, of its red.

    A mask that EXIF does not turn itself is of the image as it is stored, and turned with it; with
    config.data.masks.drawn_on = "shown", of the image as it is shown. Where it is transparent, it
    has the background's red. `shape` is of the image as it is shown, `orientation` its EXIF's.

    Raises:
      BrokenRecord: the bytes are no image.
      SetupError: it is an image of another size than `shape`, or of other classes.
    """
    masks, name = cfg.masks, f"{cfg.name} record {example}"
    values = _mask_values(record["mask"], shape, cfg, name, orientation)
    raw = values.astype(np.int32)
    classes = np.where(raw == masks.ignore, IGNORED, raw + masks.offset)
    outside = (raw != masks.ignore) & ((classes < 0) | (classes >= masks.num_classes))
    wrong = values[(raw != values) | outside]  # no whole number, or no class
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
    orientation = read(record["image"]).orientation
    return image, decode_mask(record, image.shape[:2], cfg, example, orientation)


# --- a part of a JPEG
# The region decoder of libjpeg-turbo 3 skips the inverse DCT, upsampling and colours of what a crop
# leaves out, a quarter of the time for ImageNet's inception crops (docs/data.md). The pixels are
# those of OpenCV's decoder, bit for bit. The library is the system's, or that in the wheel
# `turbojpeg` (extra [fast]); without it, and for files of any other kind, OpenCV decodes all.

# Of turbojpeg.h.
DECOMPRESS, RGB = 1, 0
ALIGNED = 32  # pixels; a multiple of every width of a block (iMCU), where a region may begin
MARGIN = 2  # pixels whose colours are interpolated with those beside them
FRAMES = range(0xC0, 0xC3)  # markers of baseline, extended and progressive Huffman frames
EXIF = 0xE1  # may turn the image: left to OpenCV


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: np.ndarray) -> np.ndarray:
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


class _Region(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in "xywh")


@functools.cache
def libjpeg() -> ctypes.CDLL | None:
    """libjpeg-turbo 3, or None."""
    paths, handle = [ctypes.util.find_library("turbojpeg")], ctypes.c_void_p
    with contextlib.suppress(metadata.PackageNotFoundError):
        files = metadata.files("turbojpeg") or []
        paths += [str(file.locate()) for file in files if "libturbojpeg" in file.name]
    for path in filter(None, paths):
        with contextlib.suppress(OSError, AttributeError):  # another architecture, an older version
            lib, data = ctypes.CDLL(path), (ctypes.c_char_p, ctypes.c_size_t)
            lib.tj3Init.restype, lib.tj3Init.argtypes = handle, [ctypes.c_int]
            lib.tj3DecompressHeader.argtypes = [handle, *data]
            lib.tj3SetCroppingRegion.argtypes = [handle, _Region]
            lib.tj3Decompress8.argtypes = [handle, *data, handle, ctypes.c_int, ctypes.c_int]
            return lib
    return None


_own = threading.local()  # a decoder per thread


def jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width where `jpeg_region` can decode it: a whole colour JPEG without EXIF."""
    if encoded[:2] != b"\xff\xd8" or not encoded.endswith(b"\xff\xd9") or libjpeg() is None:
        return None
    at = 2
    while at + 10 <= len(encoded) and encoded[at] == 0xFF and encoded[at + 1] != EXIF:
        if encoded[at + 1] in FRAMES:
            precision, components = encoded[at + 4], encoded[at + 9]
            height, width = (int.from_bytes(encoded[i : i + 2]) for i in (at + 5, at + 7))
            fits = 0 < height * width <= supmim_jax.MOST_PIXELS
            return (height, width) if fits and (precision, components) == (8, 3) else None
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4])
    return None


def jpeg_region(encoded: bytes, box: Box, shape: tuple[int, int]) -> np.ndarray | None:
    """The box of the image, uint8 HxWx3 (RGB), as if all of it had been decoded.

    None where the library finds fault with the file. `shape` is what `jpeg_size` tells.
    """
    lib = libjpeg()
    if not hasattr(_own, "handle"):
        _own.handle = lib.tj3Init(DECOMPRESS)
    left = max(0, (box.left - MARGIN) // ALIGNED * ALIGNED)
    top = max(0, box.top - MARGIN)
    bottom = min(shape[0], box.top + box.height + MARGIN)
    right = min(shape[1], box.left + box.width + MARGIN)
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    failed = (
        lib.tj3DecompressHeader(_own.handle, encoded, len(encoded))
        or lib.tj3SetCroppingRegion(_own.handle, _Region(left, top, right - left, bottom - top))
        or lib.tj3Decompress8(_own.handle, encoded, len(encoded), pixels.ctypes.data, 0, RGB)
    )
    return None if failed else box._replace(top=box.top - top, left=box.left - left).of(pixels)
