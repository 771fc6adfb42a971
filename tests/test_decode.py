"""What the encoder sees is what a person sees: against Pillow, over a background."""

import dataclasses
import io
import struct

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from pictures import png, put, store
from PIL import Image, ImageOps

from supmim_jax.config import DataConfig, MasksConfig
from supmim_jax.data import decode, source, transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.data.prepare import folder
from supmim_jax.errors import ConfigError, SetupError

SIZE = 16
YY, XX = np.mgrid[:SIZE, :SIZE]
# A red apple on nothing: what is not seen is red, too; half seen in its middle.
APPLE = np.full((SIZE, SIZE, 4), (220, 30, 10, 0), np.uint8)
APPLE[..., 3] = np.where(XX < 6, 0, np.where(XX < 10, 17 * YY, 255))
CFG = DataConfig(
    name="set", channels=3, image_size=SIZE, eval_resize=SIZE, crop="random", flip=False
)


def saved(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def deep(image: np.ndarray, ending: str = ".png") -> bytes:
    """A file of an image HxW or HxWxC (RGB or RGBA) of any type."""
    order = {3: [2, 1, 0], 4: [2, 1, 0, 3]}
    image = image[..., order[image.shape[2]]] if image.ndim == 3 else image
    return cv2.imencode(ending, image)[1].tobytes()


def seen(encoded: bytes, background=(255, 255, 255)) -> np.ndarray:
    """As Pillow shows it."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded))).convert("RGBA")
    under = Image.new("RGBA", image.size, (*background, 255))
    under.alpha_composite(image)
    return np.asarray(under.convert("RGB")).astype(int)


def transparent() -> dict[str, bytes]:
    apple, grey = Image.fromarray(APPLE), Image.fromarray((XX * 10).astype(np.uint8))
    palette = Image.fromarray((XX % 4).astype(np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    two = grey.point(lambda x: 255 * (x > 70)).convert("1")
    frames = {"save_all": True, "append_images": [apple.transpose(Image.Transpose.ROTATE_90)]}
    return {
        "png": saved(apple, "PNG"),
        "grey and alpha": saved(apple.convert("LA"), "PNG"),
        "palette": saved(palette, "PNG", transparency=b"\x00\x80\xff\xff"),
        "one of a palette": saved(palette, "PNG", transparency=2),
        "one colour": saved(apple.convert("RGB"), "PNG", transparency=(220, 30, 10)),
        "one grey": saved(grey, "PNG", transparency=50),
        "one of two": saved(two, "PNG", transparency=0),
        "webp": saved(apple, "WEBP", lossless=True, exact=True),
        "lossy webp": saved(apple, "WEBP", quality=100),
        "gif": saved(palette, "GIF", transparency=2),
        "apng": saved(apple, "PNG", **frames),
        "animated webp": saved(apple, "WEBP", lossless=True, **frames),
        "tiff": saved(apple, "TIFF"),
        "turned png": saved(apple, "PNG", exif=turned(6)),
        "turned webp": saved(apple, "WEBP", lossless=True, exif=turned(5)),
        "turned tiff": saved(apple, "TIFF", exif=turned(8)),
    }


def opaque() -> dict[str, bytes]:
    apple = Image.fromarray(APPLE).convert("RGB")
    files = {form: saved(apple, form) for form in ("PNG", "BMP", "PPM", "GIF", "TIFF")}
    files["WEBP"] = saved(apple, "WEBP", lossless=True)
    files["RGBA, all of it seen"] = saved(apple.convert("RGBA"), "PNG")
    for i in range(1, 9):
        for form, options in (
            ("JPEG", {"quality": 98, "subsampling": 0}),
            ("PNG", {}),
            ("TIFF", {}),
        ):
            files[f"{form} {i}"] = saved(apple, form, exif=turned(i), **options)
    return files


PICTURES = transparent() | opaque()


@pytest.mark.parametrize("kind", list(PICTURES))
def test_a_picture_is_as_pillow_shows_it_in_training_and_evaluation(kind):
    file = PICTURES[kind]
    record, wanted = {"image": file, "label": 0}, seen(file)
    close = 12 if kind == "lossy webp" else 4 if "JPEG" in kind else 1
    images = [
        decode.decode_image(record, CFG, 0),
        transforms.EvalExample(CFG)((0, record))["image"],
        transforms.TrainExample(CFG, 0, 1)((0, 0, record))["image"],
    ]
    for image in images:
        assert image.dtype == np.uint8 and np.abs(image - wanted).max() <= close
    grey = decode.decode_image(record, dataclasses.replace(CFG, channels=1), 0)
    assert np.abs(grey[..., 0] - wanted @ (0.299, 0.587, 0.114)).max() <= close + 1


def test_one_grey_of_four_is_transparent():
    """Of 2 bits a pixel, which Pillow compares with 8."""
    rows = (b"\0" + bytes([0b00011011] * 4)) * SIZE
    file = png(SIZE, rows, bits=2, more=((b"tRNS", b"\0\1"),))
    assert decode.pixels(file, 1)[5, :5, 0].tolist() == [0, 255, 170, 255, 0]


@pytest.mark.parametrize("kind", ["png", "palette", "webp", "tiff", "one grey"])
def test_the_background_is_the_configs(kind):
    file, colour = PICTURES[kind], (10, 200, 90)
    image = decode.decode_image({"image": file}, dataclasses.replace(CFG, background=colour), 0)
    assert np.abs(image - seen(file, colour)).max() <= 1


def test_a_background_is_three_values():
    with pytest.raises(ConfigError, match="background"):
        DataConfig(background=(255,))


def test_alpha_of_16_bits():
    rgba = np.zeros((SIZE, SIZE, 4), np.uint16)
    rgba[..., 0], rgba[..., 3] = 40_000, XX * 4369
    image, alpha = decode.pixels(deep(rgba), 3, decode.Shown(max_value=65535)), XX / 15
    for channel, value in ((0, 40_000 / 257), (2, 0)):
        wanted = value * alpha + 255 * (1 - alpha)
        assert np.abs(image[..., channel] - wanted).max() <= 0.51


def bmp_with_alpha() -> bytes:
    head = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, 16, 1, 1, 0, 0)
    masks = struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000).ljust(68, b"\0")
    return b"BM" + struct.pack("<IHHI", 138, 0, 0, 122) + head + masks + bytes(16)


@pytest.mark.parametrize(
    "file",
    [
        saved(Image.fromarray(APPLE).convert("LA"), "TIFF"),
        deep(APPLE.astype(np.uint16) * 257, ".tiff"),
        bmp_with_alpha(),
    ],
    ids=["grey and alpha in TIFF", "16-bit alpha in TIFF", "alpha in BMP"],
)
def test_an_alpha_channel_that_would_be_dropped_is_refused_by_name(file):
    with pytest.raises(SetupError, match=r"set record 7: 'image' .*alpha.*PNG"):
        decode.decode_image({"image": file}, dataclasses.replace(CFG, max_value=65535.0), 7)


TWELVE = (1000 + 890 * np.sin(XX / 3.0)).astype(np.uint16)
MORE = {
    "png": (deep(TWELVE), 4095),
    "tiff": (deep(TWELVE, ".tiff"), 4095),
    "colour": (deep(np.dstack([TWELVE * 16, TWELVE, TWELVE * 30])), 65535),
    "float tiff": (deep((TWELVE / 2000).astype(np.float32), ".tiff"), 1),
}


@pytest.mark.parametrize("kind", list(MORE))
def test_more_than_8_bits_are_scaled_by_what_is_white_and_refused_where_nobody_says(kind):
    file, white = MORE[kind]
    record = {"image": file, "label": 0}
    for wrong in (CFG, dataclasses.replace(CFG, max_value=white / 16)):
        with pytest.raises(SetupError, match=r"set record 5: 'image' .*config\.data\.max_value"):
            decode.decode_image(record, wrong, 5)
    for make, drawn in (
        (transforms.TrainExample(CFG, 0, 1), (0, 5, record)),
        (transforms.EvalExample(CFG), (5, record)),
    ):
        with pytest.raises(SetupError, match="record 5"):  # not replaced, as a broken one
            make(drawn)
    image = decode.decode_image(record, dataclasses.replace(CFG, max_value=white), 5)
    stored = cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_UNCHANGED).astype(np.float64)
    stored = stored[..., ::-1] if stored.ndim == 3 else stored[..., None]
    assert np.abs(image - stored * 255 / white).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("white", [15, 100, 1000, 4095])
def test_a_file_that_says_what_is_white_is_scaled_by_that(white):
    row = (XX * white // 15).astype(">u2" if white > 255 else np.uint8)
    file = b"P5\n# made by a microscope\n16 16\n%d\n" % white + row.tobytes()
    found = decode.pixels(file, 3)
    assert np.abs(found[..., 0] - row.astype(float) * 255 / white).max() <= 0.5 + 1e-9


def test_negative_values_and_nan_are_refused():
    for wrong in (-0.5, np.nan):
        image = np.full((4, 4), 0.5, np.float32)
        image[1, 1] = wrong
        with pytest.raises(decode.Unclear):
            decode.pixels(deep(image, ".tiff"), 3, decode.Shown(max_value=1))


@pytest.mark.parametrize(
    ("kind", "white", "half"), [(np.float32, 1.0, 128), (np.uint16, 4095.0, 127)]
)
def test_features_of_tfds_that_are_no_bytes(tmp_path, kind, white, half):
    feature = tfds.features.Image(shape=(1, 5, 1), dtype=kind, encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=30)
    image = (white * np.linspace(0, 1, 5)).astype(kind).reshape(1, 5, 1)
    examples = [(0, {"image": image, "label": 3})]
    store("deep", {"image": feature, "label": label}, {"train": examples}, tmp_path)
    cfg, name = DataConfig(name="deep", data_dir=str(tmp_path)), kind.__name__
    with pytest.raises(SetupError, match=rf"deep.*'image'.*{name}.*config\.data\.max_value"):
        source.Source(cfg).records("train")
    cfg = dataclasses.replace(cfg, max_value=white)
    image = decode.decode_image(source.Source(cfg).records("train")[0], cfg, 0)
    assert image.ravel().tolist() == [0, 64, half, 191, 255]


def corner(height: int, width: int) -> np.ndarray:
    """Bright where its class is 1: in a part that no turn leaves in its place."""
    found = np.zeros((height, width), np.uint8)
    found[: height // 3, : width // 2] = 1
    return found


MASKED = dataclasses.replace(CFG, channels=1, masks=MasksConfig(field="mask", num_classes=2))


def agree(record: dict, cfg: DataConfig) -> bool:
    examples = [
        transforms.MaskedExample(cfg)((3, record)),
        transforms.MaskedTrainExample(cfg, 0)((0, 3, record)),
        dict(zip(("image", "masks"), decode.decode_both(record, cfg, 3))),
    ]
    alike = [((x["image"][..., 0] > 128) == (x["masks"] == 1)).mean() for x in examples]
    return min(alike) > 0.97


@pytest.mark.parametrize("shape", [(24, 24), (24, 18)], ids=["square", "tall"])
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_is_turned_as_its_image_is(form, orientation, shape):
    mask, options = corner(*shape), {"lossless": True} if form == "WEBP" else {}
    photo = Image.fromarray(np.repeat(mask[..., None] * 255, 3, 2))
    image = saved(photo, form, exif=turned(orientation), **options)
    record = {"image": image, "mask": saved(Image.fromarray(mask), "PNG")}
    assert agree(record, MASKED)
    # A mask that EXIF turns itself, and one that was drawn on the image as it is shown.
    own = saved(Image.fromarray(mask), "PNG", exif=turned(orientation))
    assert agree({"image": image, "mask": own}, MASKED)
    on_shown = dataclasses.replace(MASKED.masks, drawn_on="shown")
    shown = saved(Image.fromarray(decode.turned(mask, orientation).copy()), "PNG")
    wrong, right = {"image": image, "mask": shown}, dataclasses.replace(MASKED, masks=on_shown)
    assert agree(wrong, right)
    if shape == (24, 18) and orientation >= 5:  # it fits in one way alone: the other is refused
        for file, cfg, fits in ((wrong, MASKED, "shown"), (record, right, "stored")):
            with pytest.raises(SetupError, match=rf"set record 3.*masks\.drawn_on='{fits}'"):
                decode.decode_both(file, cfg, 3)


def test_where_a_mask_is_transparent_it_has_the_background():
    rgba = np.zeros((SIZE, SIZE, 4), np.uint8)
    rgba[..., 0], rgba[..., 3] = 1, 255 * (XX < 8)
    masks = MasksConfig(field="mask", num_classes=2, ignore=255)
    cfg = dataclasses.replace(CFG, masks=masks)
    key = saved(Image.fromarray((XX >= 8).astype(np.uint8)), "PNG", transparency=1)
    grey = Image.fromarray(rgba).convert("LA")
    for file, value in ((deep(rgba), 1), (key, 0), (saved(grey, "PNG"), 0)):
        found = decode.decode_mask({"mask": file}, (SIZE, SIZE), cfg, 3)
        assert (found == np.where(XX < 8, value, -1)).all()
    rgba[0, 0, 3] = 100  # a mixture of two classes
    with pytest.raises(SetupError, match="set record 3: the mask in 'mask'"):
        decode.decode_mask({"mask": deep(rgba)}, (SIZE, SIZE), cfg, 3)


def test_masks_are_whole_numbers():
    file = deep(np.full((4, 4), 0.5, np.float32), ".tiff")
    cfg = dataclasses.replace(CFG, masks=MasksConfig(field="mask"))
    with pytest.raises(SetupError, match=r"record 3.*\[0\.5\]"):
        decode.decode_mask({"mask": file}, (4, 4), cfg, 3)


def test_no_memory_is_no_broken_image(monkeypatch):
    def fail(*_):
        error = cv2.error("Failed to allocate")
        error.code = cv2.Error.StsNoMem
        raise error

    monkeypatch.setattr(decode.cv2, "imdecode", fail)
    with pytest.raises(MemoryError):
        decode.decode_image({"image": deep(APPLE[..., :3])}, CFG, 0)


def test_a_prepared_folder_shows_what_a_person_sees(tmp_path, cfg):
    for split in ("train", "val"):
        for name in ("a", "b"):
            put(tmp_path / "photos" / split / name / "apple.png", PICTURES["png"])
            put(tmp_path / "photos" / split / name / "apple.webp", PICTURES["webp"])
    folder.prepare(epath.Path(tmp_path / "photos"), "apples", str(tmp_path / "data"))
    data = dataclasses.replace(
        CFG, name="apples", data_dir=str(tmp_path / "data"), train_examples=4, num_classes=2
    )
    images = Dataset(dataclasses.replace(cfg, data=data, objective=cfg.objective)).first_images(4)
    assert (np.abs(images - seen(PICTURES["png"])) <= 1).all() and len(images) == 4
