"""Decoding a part of a JPEG against OpenCV's decoding of the whole."""

import contextlib
import io
from importlib import metadata

import cv2
import numpy as np
import pytest
from PIL import Image

from supmim_jax.config import DataConfig
from supmim_jax.data import decode, transforms
from supmim_jax.errors import SetupError

needs_library = pytest.mark.skipif(decode.libjpeg() is None, reason="needs libjpeg-turbo 3: [fast]")
CFG = DataConfig(
    name="set", channels=3, image_size=32, eval_resize=32, crop="inception", resize="linear"
)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 9 + 2, width // 9 + 2, 3), np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    noise = random.integers(-12, 13, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def encoded(image: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", **({"quality": 92} | options))
    return file.getvalue()


@needs_library
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0", "4:1:1"])
def test_a_region_is_bit_for_bit_that_of_the_whole(subsampling, progressive):
    random = np.random.default_rng(1)
    for height, width in ((61, 83), (128, 96), (17, 200), (8, 8)):
        image = photograph(height, width)
        file = encoded(image, subsampling=subsampling, progressive=progressive)
        assert decode.jpeg_size(file) == (height, width)
        whole = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)
        for _ in range(60):
            top, left = (int(random.integers(side)) for side in (height, width))
            rest = (int(random.integers(1, n + 1)) for n in (height - top, width - left))
            box = decode.Box(top, left, *rest)
            assert np.array_equal(decode.jpeg_region(file, box, (height, width)), box.of(whole)), (
                box
            )


@needs_library
def test_training_crops_do_not_depend_on_the_library(monkeypatch):
    files = [encoded(photograph(60 + i, 90 - i, i), subsampling="4:2:0") for i in range(12)]
    decoded, region = [], decode.jpeg_region
    monkeypatch.setattr(transforms, "jpeg_region", lambda *a: decoded.append(1) or region(*a))
    make = transforms.TrainExample(CFG, 5, 10)

    def views() -> list[np.ndarray]:
        return [make((i, i, {"image": f, "label": 0}))["image"] for i, f in enumerate(files)]

    with_library = views()
    monkeypatch.setattr(decode, "libjpeg", lambda: None)
    assert np.array_equal(with_library, views()) and len(decoded) == len(files)


def others() -> dict[str, bytes]:
    """Files that OpenCV alone decodes, by what they are."""
    photo, exif, cmyk = photograph(40, 50), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(photo).convert("CMYK").save(cmyk, "JPEG")
    plain = encoded(photo)
    return {
        "png": cv2.imencode(".png", photo)[1].tobytes(),
        "grey": encoded(photo[..., 0]),
        "cmyk": cmyk.getvalue(),
        "turned": encoded(photo, exif=exif),
        "cut": plain[:-200],
        "more": plain + b"\0",
        "empty": b"",
        "text": b"not an image",
        "marker": plain[:3] + b"\xff\xd9",
    }


@pytest.mark.parametrize("kind", list(others()))
def test_files_of_other_kinds_are_left_to_opencv(kind):
    example, make = {"image": others()[kind], "label": 0}, transforms.TrainExample(CFG, 0, 1)
    assert decode.jpeg_size(example["image"]) is None
    if kind in ("cut", "empty", "text", "marker"):
        with pytest.raises(decode.BrokenRecord, match=r"set record 7: 'image', \d+ bytes"):
            make((0, 7, example))
        return
    assert make((0, 0, example))["image"].shape == (32, 32, 3)
    if kind == "turned":
        assert decode.decode_image(example, CFG, 0).shape == (50, 40, 3)


@needs_library
def test_a_fault_inside_is_left_to_opencv_too():
    """The library's warning is enough: OpenCV then decides whether the image is one."""
    damaged = bytearray(encoded(photograph(64, 64), subsampling="4:2:0"))
    scan = damaged.index(b"\xff\xda") + 40
    damaged[scan : scan + 60] = bytes(60)
    damaged[scan + 30 : scan + 32] = b"\xff\xd3"  # a marker where none belongs
    file = bytes(damaged)
    assert decode.jpeg_size(file) == (64, 64)
    assert decode.jpeg_region(file, decode.Box(0, 0, 64, 64), (64, 64)) is None
    make = transforms.TrainExample(CFG, 0, 1)
    broken = decode.pixels(file, 3) is None
    with pytest.raises(decode.BrokenRecord) if broken else contextlib.nullcontext():
        assert make((0, 0, {"image": file, "label": 0}))["image"].shape == (32, 32, 3)


def test_an_older_or_foreign_library_is_none(monkeypatch, tmp_path):
    """Its symbols are asked for when it is found, not in the middle of a run."""
    foreign = tmp_path / "libturbojpeg.so"
    foreign.write_bytes(b"not a library")
    monkeypatch.setattr(metadata, "files", lambda name: [])
    for found in (str(foreign), "libc.so.6"):
        monkeypatch.setattr(decode.ctypes.util, "find_library", lambda name, found=found: found)
        assert decode.libjpeg.__wrapped__() is None


def test_a_very_wide_image_is_read_where_it_is_cropped():
    strip = np.zeros((2000, 20_000, 3), np.uint8)
    strip[:, 10_000:] = 250
    record = {"image": cv2.imencode(".jpg", strip)[1].tobytes(), "label": 0}
    example = transforms.EvalExample(CFG)((0, record))
    assert np.isin(example["image"][:, [0, -1]], (0, 250)).all() and example["broken"] == -1
    views = [transforms.TrainExample(CFG, seed, 1)((0, 0, record))["image"] for seed in range(8)]
    assert all(view.shape == (32, 32, 3) for view in views)
    assert {0, 250} <= {int(np.median(view)) for view in views}


@pytest.mark.parametrize("label", [-1, 30])
def test_a_label_that_is_no_class_ends_the_run(label):
    record = {"image": encoded(photograph(40, 50)), "label": label}
    for make, drawn in (
        (transforms.TrainExample(CFG, 0, 1), (0, 5, record)),
        (transforms.EvalExample(CFG), (5, record)),
    ):
        with pytest.raises(SetupError, match=f"record 5 has 'label' = {label}, expected 0 to 29"):
            make(drawn)
