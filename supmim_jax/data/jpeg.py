"""Decodes a part of a JPEG, by libjpeg-turbo 3, where that library is installed.

Its region decoder skips the inverse DCT, upsampling and colours of what a crop leaves out, a
quarter of the time for ImageNet's inception crops (docs/data.md). The pixels are those of OpenCV's
decoder, bit for bit. The library is the system's, or that in the wheel `turbojpeg` (extra [fast]);
without it, and for files of any other kind, OpenCV decodes the whole image.
"""

import contextlib
import ctypes
import ctypes.util
import functools
import threading
from importlib import metadata

import numpy as np

import supmim_jax
from supmim_jax.data.crops import Box

# Of turbojpeg.h, libjpeg-turbo 3.
DECOMPRESS, RGB = 1, 0
ALIGNED = 32  # pixels; a multiple of every width of a block (iMCU), where a region may begin
MARGIN = 2  # pixels whose colours are interpolated with those beside them
FRAMES = range(0xC0, 0xC3)  # markers of baseline, extended and progressive Huffman frames
EXIF = 0xE1  # may turn the image: left to OpenCV


class Region(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int) for name in "xywh")


@functools.cache
def library() -> ctypes.CDLL | None:
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
            lib.tj3SetCroppingRegion.argtypes = [handle, Region]
            lib.tj3Decompress8.argtypes = [handle, *data, handle, ctypes.c_int, ctypes.c_int]
            return lib
    return None


_own = threading.local()  # a decoder per thread


def size(encoded: bytes) -> tuple[int, int] | None:
    """Height and width, where `region` can decode the image: a whole colour JPEG without EXIF."""
    if encoded[:2] != b"\xff\xd8" or not encoded.endswith(b"\xff\xd9") or library() is None:
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


def region(encoded: bytes, box: Box, shape: tuple[int, int]) -> np.ndarray | None:
    """The box of the image, uint8 HxWx3 (RGB), as if all of it had been decoded.

    Args:
      encoded: the file.
      box: in pixels of the whole image.
      shape: the image's, as `size` tells.

    Returns None where the library finds fault with the file.
    """
    lib = library()
    if not hasattr(_own, "handle"):
        _own.handle = lib.tj3Init(DECOMPRESS)
    left = max(0, (box.left - MARGIN) // ALIGNED * ALIGNED)
    top = max(0, box.top - MARGIN)
    bottom = min(shape[0], box.top + box.height + MARGIN)
    right = min(shape[1], box.left + box.width + MARGIN)
    pixels = np.empty((bottom - top, right - left, 3), np.uint8)
    failed = (
        lib.tj3DecompressHeader(_own.handle, encoded, len(encoded))
        or lib.tj3SetCroppingRegion(_own.handle, Region(left, top, right - left, bottom - top))
        or lib.tj3Decompress8(_own.handle, encoded, len(encoded), pixels.ctypes.data, 0, RGB)
    )
    return None if failed else box._replace(top=box.top - top, left=box.left - left).of(pixels)
