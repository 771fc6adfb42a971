"""What an image file says of itself before it is decoded: its form, size, depth, alpha and turn.

OpenCV's decoders say nothing of these, and drop some: it is asked for colour or for all that there
is as this tells (decode.py). And where it decodes nothing, this tells what is wrong with the file.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import supmim_jax

MOST_SIDE = 2**20  # pixels; OpenCV's own limit to a side
MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
} | {b"P%d" % i + end: "PNM" for i in range(1, 7) for end in (b" ", b"\t", b"\n", b"\r")}
ORIENTATION = 0x0112  # EXIF's and TIFF's tag


@dataclass(frozen=True, slots=True)
class Header:
    kind: str  # a value of MAGIC, or WebP
    height: int  # pixels as they are stored
    width: int
    bits: int  # of a channel
    alpha: bool = False  # or perhaps: of a GIF only decoding tells
    orientation: int = 1  # 1 to 8, as EXIF counts: how it is to be turned when it is shown
    whole: bool = True  # whether its end is there
    white: int = 0  # the value that is white, where the file says that
    key: int | None = None  # of a grey PNG, the value that is transparent
    unread: str = ""  # what it has that OpenCV's decoder drops


def kind(encoded: bytes) -> str:
    """Of which form a file is, by its first bytes; "" for one that is none of ours."""
    if encoded[:4] == b"RIFF" and encoded[8:12] == b"WEBP":
        return "WebP"
    return next((name for magic, name in MAGIC.items() if encoded.startswith(magic)), "")


def read(encoded: bytes) -> Header | None:
    """The header of a file, or of its beginning; None if it is of another form, or damaged."""
    parse = PARSERS.get(kind(encoded))
    try:
        return parse(encoded) if parse else None
    except (IndexError, ValueError, struct.error):
        return None


def fault(encoded: bytes) -> str:
    """What is wrong with a file that is not decoded, as its header tells."""
    if not encoded:
        return "is empty"
    if not kind(encoded):
        known = ", ".join(dict.fromkeys([*MAGIC.values(), "WebP"]))
        return f"begins with {encoded[:4].hex(' ')}, which is none of {known}"
    found = read(encoded)
    if found is None:
        return f"cannot be decoded: the header of a {kind(encoded)} is cut or damaged"
    size = f"has {found.width} x {found.height}"
    if found.height * found.width > supmim_jax.MOST_PIXELS:
        return (
            f"{size} = {found.width * found.height} pixels, more than the "
            f"{supmim_jax.MOST_PIXELS} that are decoded: set the environment variable "
            f"OPENCV_IO_MAX_IMAGE_PIXELS, here and where it is trained on"
        )
    if max(found.height, found.width) > MOST_SIDE:
        return f"{size} pixels, more than {MOST_SIDE} on a side"
    if not found.whole:
        return "cannot be decoded: it is cut, its end is missing"
    if found.kind == "JPEG" and found.bits != 8:
        return f"cannot be decoded: a JPEG of {found.bits} bits a channel"
    return f"cannot be decoded: it is damaged or cut, behind a sound header ({size[4:]} pixels)"


def _jpeg(encoded: bytes) -> Header:
    at, turn, frame = 2, 1, None
    while True:
        if encoded[at] != 0xFF:
            raise ValueError("no marker")
        marker = encoded[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = int.from_bytes(encoded[at + 2 : at + 4])
        body = encoded[at + 4 : at + 2 + length]
        if marker == 0xDA:
            break
        if marker == 0xE1 and body.startswith(b"Exif\0\0"):
            turn = _orientation(body[6:])
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = struct.unpack(">BHH", body[:5])
        at += 2 + max(length, 2)
    bits, height, width = frame or struct.unpack("", b"x")
    whole = encoded.rfind(b"\xff\xd9") > at
    return Header("JPEG", height, width, bits, orientation=turn, whole=whole)


def _png(encoded: bytes) -> Header:
    found, turn, alpha, key, whole = None, 1, False, None, False
    for name, body in _chunks(encoded, 8, ">I4s", 12):
        if name == b"IHDR":
            found = struct.unpack(">IIBB", body[:10])
            alpha = bool(found[3] & 4)
        elif name == b"tRNS":
            alpha = True
            key = int.from_bytes(body[:2]) if found and found[3] == 0 else None
        elif name == b"eXIf":
            turn = _orientation(body)
        elif name == b"IEND":
            whole = True
            break
    width, height, bits, _ = found or struct.unpack("", b"x")
    return Header("PNG", height, width, bits, alpha, turn, whole, key=key)


def _webp(encoded: bytes) -> Header:
    found, alpha, turn = None, False, 1
    for name, body in _chunks(encoded, 12, "<4sI", 8):
        if name == b"VP8X":
            alpha = bool(body[0] & 0x10)
            found = [1 + int.from_bytes(body[i : i + 3], "little") for i in (4, 7)]
        elif name == b"VP8 " and not found:
            found = [x & 0x3FFF for x in struct.unpack("<HH", body[6:10])]
        elif name == b"VP8L":
            size = int.from_bytes(body[1:5], "little")
            alpha = alpha or bool(size >> 28 & 1)
            found = found or [1 + (size & 0x3FFF), 1 + (size >> 14 & 0x3FFF)]
        elif name == b"EXIF":
            turn = _orientation(body.removeprefix(b"Exif\0\0"))
    width, height = found or struct.unpack("", b"x")
    whole = len(encoded) >= 8 + int.from_bytes(encoded[4:8], "little")
    return Header("WebP", height, width, 8, alpha, turn, whole)


def _chunks(encoded: bytes, at: int, form: str, around: int) -> Iterator[tuple[bytes, bytes]]:
    """Names and contents of the chunks of a PNG or a RIFF file; of the last perhaps a part."""
    while at + 8 <= len(encoded):
        a, b = struct.unpack_from(form, encoded, at)
        name, length = (a, b) if isinstance(a, bytes) else (b, a)
        yield name, encoded[at + 8 : at + 8 + length]
        at += around + length + (length % 2 if around == 8 else 0)


def _gif(encoded: bytes) -> Header:
    width, height = struct.unpack("<HH", encoded[6:10])
    return Header("GIF", height, width, 8, True, whole=encoded.rstrip(b"\0").endswith(b";"))


def _bmp(encoded: bytes) -> Header:
    size, dib, width, height = struct.unpack("<I8xIii", encoded[2:26])
    bits, form = struct.unpack("<HI", encoded[28:34])
    unread = "an alpha channel" if form in (3, 6) and dib >= 56 and any(encoded[66:70]) else ""
    whole = len(encoded) >= size
    return Header("BMP", abs(height), width, 8 if bits >= 8 else bits, whole=whole, unread=unread)


def _tiff(encoded: bytes) -> Header:
    tags = _tags(encoded)
    width, height, bits = tags[256][0], tags[257][0], max(tags.get(258, [1]))
    colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(tags.get(262, [1])[0], 1)
    extra, alpha = tags.get(277, [1])[0] - colours, tags.get(338, [])
    # libtiff brings these to RGBA, times alpha. Of others OpenCV drops the alpha or keeps it raw.
    known = colours == 3 and bits == 8 and alpha in ([1], [2])
    unread = "" if known or extra <= 0 else "an alpha channel"
    if bits > 8 and tags.get(262) == [0]:
        unread = "a scale on which 0 is white"
    turn = tags.get(ORIENTATION, [1])[0]
    return Header("TIFF", height, width, bits, extra > 0, turn, unread=unread)


def _pnm(encoded: bytes) -> Header:
    words: list[bytes] = []
    for line in encoded[2:1024].split(b"\n"):
        words += line.partition(b"#")[0].split()[: 3 - len(words)]
    width, height = int(words[0]), int(words[1])
    white = 0 if encoded[1:2] in b"14" else int(words[2])
    return Header("PNM", height, width, white.bit_length() or 1, white=white)


def _orientation(exif: bytes) -> int:
    """How the image is to be turned, as its EXIF says; 1, not at all, where that is damaged."""
    try:
        found = _tags(exif).get(ORIENTATION, [1])[0]
    except (IndexError, ValueError, struct.error, KeyError):
        return 1
    return found if 1 <= found <= 8 else 1


def _tags(encoded: bytes) -> dict[int, list[int]]:
    """The whole numbers in the first directory of a TIFF file, by tag."""
    order = {b"II": "<", b"MM": ">"}.get(encoded[:2], "")
    if not order:
        raise ValueError("no TIFF")
    (at,) = struct.unpack(f"{order}I", encoded[4:8])
    (count,) = struct.unpack(f"{order}H", encoded[at : at + 2])
    found = {}
    for entry in range(at + 2, at + 2 + 12 * count, 12):
        tag, form, number = struct.unpack(f"{order}HHI", encoded[entry : entry + 8])
        if form not in (3, 4) or not 0 < number <= 16:
            continue
        size = (2 if form == 3 else 4) * number
        place = entry + 8
        if size > 4:
            (place,) = struct.unpack(f"{order}I", encoded[place : place + 4])
        letter = "H" if form == 3 else "I"
        found[tag] = list(struct.unpack(f"{order}{number}{letter}", encoded[place : place + size]))
    return found


PARSERS = {
    "JPEG": _jpeg,
    "PNG": _png,
    "WebP": _webp,
    "GIF": _gif,
    "BMP": _bmp,
    "TIFF": _tiff,
    "PNM": _pnm,
}
