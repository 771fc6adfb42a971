"""Preparing a folder of images."""

import errno
import os
import re
import shutil

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import python
from etils import epath
from pictures import CLASSES, WNIDS, contents, encoded, png, put, raw, source

from supmim_jax.config import DataConfig
from supmim_jax.data import decode
from supmim_jax.data.prepare import folder, output
from supmim_jax.errors import SetupError


def prepared(root, data_dir, name="beasts", **options) -> str:
    return folder.prepare(epath.Path(root), name, str(data_dir), **options)


def link(path, to) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


@pytest.fixture
def tiny(tmp_path):
    """Tiny-ImageNet's layout."""
    root = tmp_path / "tiny-imagenet-200"
    put(root / "wnids.txt", "\n".join(reversed(WNIDS)) + "\n")
    for wnid in WNIDS:
        for i in range(4):
            put(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", encoded(i, ".jpeg"))
        put(root / "train" / wnid / f"{wnid}_boxes.txt", "0\t0\t1\t1\n")
    lines = [f"val_{i}.JPEG\t{WNIDS[(i + 1) % 3]}\t0\t0\t1\t1\n" for i in range(6)]
    put(root / "val" / "val_annotations.txt", "".join(lines))
    for i in range(6):
        put(root / "val" / "images" / f"val_{i}.JPEG", encoded(50 + i, ".jpeg"))
    put(root / "test" / "images" / "test_0.JPEG", encoded(99, ".jpeg"))
    return root


def test_a_folder_opens_in_training_with_its_labels_bytes_and_order(photos, tmp_path):
    text = prepared(photos, tmp_path / "data")
    builder = tfds.builder("beasts", data_dir=tmp_path / "data")
    for split, directory, count in (("train", "train", 36), ("validation", "val", 9)):
        paths = sorted(
            (path.relative_to(photos).as_posix() for path in (photos / directory).rglob("*.*")),
            key=lambda name: (name.split("/")[1], name),
        )
        paths = [path for path in paths if "notes" not in path and "hidden" not in path]
        records = source(tmp_path / "data", split=split)
        assert len(records) == len(paths) == count
        names = [example["file_name"].decode() for example in builder.as_data_source(split)]
        assert names == paths
        for i, path in enumerate(paths):
            assert records[i]["image"] == (photos / path).read_bytes()
            assert CLASSES[records[i]["label"]] == path.split("/")[1]
    info = builder.info
    assert tuple(info.features["label"].names) == CLASSES
    assert info.supervised_keys == ("image", "label") and str(info.version) == "1.0.0"
    total = sum(len(record) for record in raw(tmp_path / "data/beasts/1.0.0", "train"))
    assert total <= info.splits["train"].num_bytes <= total + 30 * 36
    for part in (
        "name=beasts",
        "channels=3",
        "num_classes=3",
        "train_examples=36",
        f"data_dir={tmp_path}",
    ):
        assert f"--config.data.{part}" in text
    assert "eval_split" not in text and "label_field" not in text
    assert "Prepared already" in prepared(photos, tmp_path / "data")


def test_tiny_imagenet_is_recognised(tiny, tmp_path):
    prepared(tiny, tmp_path / "data", "tiny_imagenet")
    builder = tfds.builder("tiny_imagenet", data_dir=tmp_path / "data")
    assert tuple(builder.info.features["label"].names) == WNIDS
    counts = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert counts == {"train": 12, "validation": 6}
    examples = builder.as_data_source("validation")
    labels = {e["file_name"].decode(): e["label"] for e in examples}
    assert labels == {f"val/images/val_{i}.JPEG": (i + 1) % 3 for i in range(6)}
    assert list(labels.values()) == [0, 0, 1, 1, 2, 2]


def test_a_fraction_for_validation_is_of_each_class_and_stable(photos):
    shutil.rmtree(photos / "val")
    before = folder.Folder(epath.Path(photos), 0.25).splits
    for split, count in (("train", 9), ("validation", 3)):
        assert [file.label for file in before[split]] == [0] * count + [1] * count + [2] * count
    assert {f.name for f in before["train"]}.isdisjoint(f.name for f in before["validation"])
    first = sorted(f.name for files in before.values() for f in files if f.label == 0)[:3]
    assert [f.name for f in before["validation"] if f.label == 0] != first  # a hash chooses
    for i in range(5):
        put(photos / "train" / "dog" / f"{i}.png", encoded(i))
    put(photos / "train" / "eel" / "0.png", encoded(0))
    after = folder.Folder(epath.Path(photos), 0.25).splits
    for split, new in (("train", 5), ("validation", 1)):
        old = [f.name for f in after[split] if f.label < 3]
        assert old == [f.name for f in before[split]]
        assert len(after[split]) == len(old) + new
    assert after["train"][-1].name == "train/eel/0.png"  # a single image is for training


def without(root, split: str, classes=CLASSES) -> None:
    for name in classes:
        shutil.rmtree(root / split / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, r"photos is no directory"),
        (lambda r: (r / "train").rename(r / "training"), r"no directory train/"),
        (lambda r: shutil.rmtree(r / "val"), r"neither val/ nor validation/.*--val_fraction"),
        (lambda r: put(r / "validation/ape/0.png"), r"both val/ and validation/"),
        (lambda r: (r / "train/dog").mkdir(), r"no images of 1 of 4 classes: dog"),
        (lambda r: put(r / "val/dog/0.png"), r"val has 1 classes that .*/train lacks: dog"),
        (lambda r: put(r / "test/dog/0.png"), r"test has 1 classes that .*/train lacks: dog"),
        (lambda r: put(r / "train/0.png"), r"train/0\.png is in no class.*<class>/0\.png"),
        (lambda r: put(r / "test/0.png"), r"test/0\.png is in no class"),
        (lambda r: without(r, "train"), r"train has no images"),
        (lambda r: without(r, "val"), r"val has no images"),
        (
            lambda r: (without(r, "train", CLASSES[1:]), without(r, "val", CLASSES[1:])),
            r"one class, 'ape'",
        ),
        (
            lambda r: link(r / "train/ape/x.png", "/etc/hostname"),
            r"x\.png .* to /etc/hostname, which is outside",
        ),
        (lambda r: link(r / "train/dog", "/usr"), r"train/dog .* to /usr, which is outside"),
        (lambda r: link(r / "train/ape/up", r / "train"), r"train/ape/up leads up to .*/train"),
        (lambda r: link(r / "test", "/gone/test"), r"test is a symbolic link to /gone/test"),
        (lambda r: link(r / "train/dog", "/gone/d"), r"train/dog is a symbolic link to /gone/d"),
        (lambda r: (r / "train/ape").rename(r / "train/a\npe"), r"is named 'a\\npe'"),
        (lambda r: os.rename(r / "train/ape", os.fsencode(r / "train") + b"/\xff"), r"is named '"),
        (lambda r: os.rename(r / "val/ape/0.Png", r / "val/ape/\n.png"), r"is named '\\n\.png'"),
        (lambda r: put(r / "val/val_annotations.txt", "x"), r"no wnids\.txt"),
    ],
)
def test_a_folder_that_cannot_be_used_is_answered_by_what_to_change(
    photos, tmp_path, change, message
):
    change(photos)
    with pytest.raises(SetupError, match=message):
        prepared(photos, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("lines", "files", "message"),
    [
        (f"val_6.JPEG\t{WNIDS[0]}\n", {}, r"line 7 names 'val_6\.JPEG'"),
        (f"val_0.JPEG\t{WNIDS[0]}\n", {}, r"line 7 names 'val_0\.JPEG'"),
        (f"../../x\t{WNIDS[0]}\n", {}, r"line 7 names '\.\./\.\./x'"),
        ("val_6.JPEG\tn00000000\n", {"val/images/val_6.JPEG": ""}, r"line 7 names 'n00000000'"),
        ("", {"val/images/val_6.JPEG": ""}, r"no line for 1 files.*val_6\.JPEG"),
        ("", {"val/n01440764/0.JPEG": ""}, r"two layouts"),
        ("", {"wnids.txt": "\n".join(WNIDS[1:])}, r"wnids\.txt lacks: n01440764"),
        ("", {"wnids.txt": "\n".join((*WNIDS, "../x"))}, r"no images of 1 of 4 classes: \.\./x"),
        ("", {"wnids.txt": "\n".join((*WNIDS, WNIDS[0]))}, r"no images of 1 of 4.*n01440764"),
    ],
)
def test_a_wrong_tiny_imagenet_is_answered_by_the_line(tiny, tmp_path, lines, files, message):
    with open(tiny / "val" / "val_annotations.txt", "a") as annotations:
        annotations.write(lines)
    for name, content in files.items():
        put(tiny / name, content)
    with pytest.raises(SetupError, match=message):
        prepared(tiny, tmp_path / "data")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "name",
    ["", "Beasts", "../x", "a.b", "_x", "1a", "a__b", "fractals", "mnist", "toy_pictures"],
)
def test_names_that_tfds_could_not_open_or_has_itself_are_refused(photos, tmp_path, name):
    with pytest.raises(SetupError, match=f"--as is {name!r}"):
        prepared(photos, tmp_path / "data", name)


def test_files_that_are_no_images_are_listed_and_stop_it_or_are_left_out(photos, tmp_path):
    whole, data = encoded(0, ".jpg", 64), tmp_path / "data"
    put(photos / "train/ape/empty.png")
    put(photos / "train/bee/text.jpg", "%PDF-1.4")
    put(photos / "train/cow/cut.jpg", whole[: len(whole) // 2])
    put(photos / "val/cow/cut.png", encoded(0)[:300])
    with pytest.raises(SetupError, match=r"4 of 49 files[\s\S]*--skip_broken") as caught:
        prepared(photos, data)
    for row in (
        "ape/empty.png is empty",
        "bee/text.jpg begins with 25 50",
        "cow/cut.jpg",
        "cut.png",
    ):
        assert row in str(caught.value)
    with pytest.raises(SetupError, match="2 of 49 files"):
        prepared(photos, data, no_decode=True)
    assert not data.exists()
    for _ in range(2):  # the second finds it done
        text = prepared(photos, data, skip_broken=True)
        assert "no images: 4" in text and "text.jpg" in text
    assert len(source(data)) == 36 and len(source(data, split="validation")) == 9


def test_a_long_list_of_broken_files_is_cut_and_a_class_of_them_alone_is_refused(photos, tmp_path):
    for i in range(25):
        put(photos / f"train/dog/{i:02d}.png", "nothing")
    with pytest.raises(SetupError, match="and 5 more") as caught:
        prepared(photos, tmp_path)
    assert str(caught.value).count("train/dog") == 20
    with pytest.raises(SetupError, match="train has no images of dog"):
        prepared(photos, tmp_path, skip_broken=True)


def test_what_is_prepared_is_not_replaced_by_another_folder(photos, tmp_path):
    prepared(photos, tmp_path / "data")
    before = contents(tmp_path / "data")
    put(photos / "train/ape/new.png", encoded(7))
    with pytest.raises(SetupError, match=r"already holds a data set \(made of .*photos\).*--as"):
        prepared(photos, tmp_path / "data")
    assert contents(tmp_path / "data") == before


@pytest.mark.parametrize(
    "change",
    [lambda path: put(path, encoded(3, ".jpg", 30)), os.remove],
    ids=["another", "gone"],
)
def test_a_file_that_changes_meanwhile_is_an_error(photos, tmp_path, monkeypatch, change):
    check = folder.find_broken
    path = photos / "train/bee/01.JPG"
    monkeypatch.setattr(folder, "find_broken", lambda *args: (check(*args), change(path))[0])
    with pytest.raises(SetupError, match=r"bee/01\.JPG has \d+ bytes now and had \d+"):
        prepared(photos, tmp_path / "data")
    assert not (tmp_path / "data/beasts/1.0.0").exists()


def test_every_form_that_is_decoded_is_an_image_by_its_name(photos, tmp_path):
    without(photos, "train", ["bee"])
    endings = [".webp", ".bmp", ".tif", ".gif", ".ppm", ".jpe", ".WebP"]
    for i, ending in enumerate(endings):
        form = {".jpe": ".jpg", ".WebP": ".webp"}.get(ending, ending)
        put(photos / f"train/bee/{i}{ending}", encoded(i, form))
    prepared(photos, tmp_path / "data")
    images = [decode.pixels(record["image"], 3) for record in source(tmp_path / "data")]
    assert [image.shape for image in images] == (24 + len(endings)) * [(24, 24, 3)]


def test_what_is_ignored_by_its_ending_is_counted_and_named_in_a_dry_run_too(photos, tmp_path):
    put(photos / "val" / "cow" / "a.svg", "<svg/>")
    put(photos / "train" / "README", "about")
    for dry_run in (True, False):
        text = prepared(photos, tmp_path / "data", dry_run=dry_run)
        line = next(line for line in text.splitlines() if "notes.txt" in line or ".svg" in line)
        assert "3 files" in line and ".txt 1" in line and ".svg 1" in line
    for i in range(3):
        put(photos / f"train/dog/{i}.svg", "<svg/>")
    with pytest.raises(SetupError, match=r"(?s)classes: dog.*3 files \(\.svg 3\).*dog/0\.svg"):
        prepared(photos, tmp_path / "other", dry_run=True)


COMPOSED, APART = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize("names", [(COMPOSED, APART), (APART, COMPOSED)])
def test_a_class_has_one_name_in_either_form_of_unicode(photos, tmp_path, names):
    for split, name in zip(("train", "val"), names, strict=True):
        (photos / split / "bee").rename(photos / split / name)
    prepared(photos, tmp_path / "data")
    labels = tfds.builder("beasts", data_dir=tmp_path / "data").info.features["label"].names
    assert labels == ["ape", names[0], "cow"]
    labels = [record["label"] for record in source(tmp_path / "data", split="validation")]
    assert labels == [0] * 3 + [1] * 3 + [2] * 3
    put(photos / "val" / names[0] / "0.png", encoded(0))
    with pytest.raises(SetupError, match=r"val has two.*(caf\\xe9.*cafe\\u0301|\\u0301.*\\xe9)"):
        prepared(photos, tmp_path / "other")


@pytest.mark.parametrize("what", ["class", "file", "split"])
def test_a_subset_of_links_is_followed_if_asked(photos, tmp_path, what):
    """As ImageNet-100 is made of the classes of ImageNet-1k."""
    subset = tmp_path / "subset"
    for split in ("train", "val"):
        if what == "split":
            link(subset / split, photos / split)
        for path in (photos / split).iterdir():
            if what == "class":
                link(subset / split / path.name, path)
            if what == "file":
                for file in path.rglob("*.*"):
                    link(subset / split / path.name / file.name, file)
    with pytest.raises(SetupError, match=r"symbolic link to .*photos.*--follow_links"):
        prepared(subset, tmp_path / "data")
    prepared(subset, tmp_path / "data", follow_links=True)
    images = sorted(record["image"] for record in source(tmp_path / "data"))
    paths = [path for path in (photos / "train").rglob("[0-9]*.*")]
    assert images == sorted(path.read_bytes() for path in paths) and len(images) == 36


def test_links_within_the_folder_are_followed_but_not_in_a_circle(photos, tmp_path):
    link(photos / "train/ape/again.png", photos / "train/bee/03.png")
    assert len(folder.Folder(epath.Path(photos)).splits["train"]) == 37
    link(photos / "train/ape/deep/bee", photos / "train/bee")
    link(photos / "train/bee/ape", photos / "train/ape")
    with pytest.raises(SetupError, match=r"train/ape/deep/bee/ape leads up to .*circle"):
        prepared(photos, tmp_path / "data")
    (photos / "train/bee/ape").unlink()
    link(photos / "train/bee/out", tmp_path / "away")
    link(tmp_path / "away" / "back", tmp_path / "away")
    with pytest.raises(SetupError, match=r"back leads up to .*away"):
        prepared(photos, tmp_path / "data", follow_links=True)


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda p: link(p, "../gone/apple.png"), r"is a symbolic link to \.\./gone/"),
        (lambda p: link(p, "/gone/apple.png"), r"is a symbolic link to /gone/apple"),
        (lambda p: link(p, p), r"is a symbolic link to .*apple\.png, which leads in a circle"),
        (os.mkfifo, r"is neither a file"),
    ],
    ids=["dangling", "dangling outside", "to itself", "a pipe"],
)
def test_what_cannot_be_read_is_a_broken_file_by_name(photos, tmp_path, change, row):
    change(photos / "train/ape/apple.png")
    with pytest.raises(SetupError, match=rf"1 of 46 files[\s\S]*train/ape/apple\.png {row}"):
        prepared(photos, tmp_path / "data")
    text = prepared(photos, tmp_path / "data", skip_broken=True)
    assert "no images: 1" in text and "train/ape/apple.png" in text
    assert len(source(tmp_path / "data")) == 36


@pytest.mark.parametrize(
    ("number", "ends"),
    [(errno.EACCES, False), (errno.ENOENT, False)]
    + [(n, True) for n in (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENOMEM)],
)
def test_an_error_of_the_system_is_no_broken_file(photos, tmp_path, monkeypatch, number, ends):
    path_type = type(epath.Path(photos))
    open_ = path_type.open

    def failing(path, *args, **kwargs):
        if path.name == "03.png":
            raise OSError(number, os.strerror(number), str(path))
        return open_(path, *args, **kwargs)

    monkeypatch.setattr(path_type, "open", failing)
    if ends:
        with pytest.raises(OSError, match=r"03\.png") as caught:
            prepared(photos, tmp_path / "data", skip_broken=True)
        assert caught.value.errno == number and not (tmp_path / "data").exists()
    else:
        text = prepared(photos, tmp_path / "data", skip_broken=True)
        assert f"03.png cannot be read: {os.strerror(number)}" in text


@pytest.mark.parametrize(
    ("content", "told", "not_told"),
    [
        (png(60_000, b""), r"3600000000 pixels.*OPENCV_IO_MAX_IMAGE_PIXELS", "cut|damaged"),
        (encoded(0)[:-40], r"cut", "OPENCV|damaged"),
        (encoded(0, ".webp")[:-40], r"cut", "OPENCV|damaged"),
        (encoded(0, ".jpg", 64)[:-40], r"cut", "OPENCV|damaged"),
        (encoded(0)[:60] + bytes(200) + encoded(0)[260:], r"damaged", "OPENCV|missing"),
    ],
    ids=["too large", "cut png", "cut webp", "cut jpeg", "damaged"],
)
def test_which_of_three_things_is_wrong_is_told(photos, tmp_path, content, told, not_told):
    put(photos / "train/ape/x.png", content)
    with pytest.raises(SetupError, match=rf"train/ape/x\.png .*{told}") as caught:
        prepared(photos, tmp_path / "data")
    assert not re.search(not_told, str(caught.value))
    with pytest.raises(decode.BrokenRecord, match=told):  # and so in training
        decode.decode_image({"image": content}, DataConfig(channels=3), 0)


def test_the_limit_of_pixels_is_raised_by_the_variable(photos, tmp_path):
    put(photos / "train/ape/x.png", encoded(0, size=64))
    command = ["-m", "supmim_jax.data.prepare", f"--image_folder={photos}"]
    command += ["--as=beasts", f"--data_dir={tmp_path / 'data'}", "--dry_run"]
    for pixels, code, text in (
        ("4000", 2, "64 x 64 = 4096 pixels, more than the 4000"),
        ("5000", 0, "37 records"),
        ("many", 2, "OPENCV_IO_MAX_IMAGE_PIXELS is 'many'"),
    ):
        out = python(*command, OPENCV_IO_MAX_IMAGE_PIXELS=pixels)
        assert out.returncode == code and text in out.stdout + out.stderr, out.stderr


@pytest.mark.parametrize("ending", [".png", ".tif"])
@pytest.mark.parametrize("options", [{}, {"skip_broken": True}, {"no_decode": True}], ids=str)
def test_more_than_8_bits_are_found_before_anything_is_written(photos, tmp_path, ending, options):
    deep = np.arange(123, 123 + 24 * 24, dtype=np.uint16).reshape(24, 24)
    put(photos / f"train/ape/xray{ending}", cv2.imencode(ending, deep)[1].tobytes())
    for dry_run in (True, False):
        with pytest.raises(SetupError, match=rf"(?s)train/ape/xray\{ending} .*--max_value"):
            prepared(photos, tmp_path / "data", dry_run=dry_run, **options)
    if not options:  # a value above white
        with pytest.raises(SetupError, match=rf"xray\{ending} .*from 123 to 698.*255"):
            prepared(photos, tmp_path / "data", max_value=255.0)
    assert not (tmp_path / "data").exists()
    for _ in range(2):  # the second finds it done
        text = prepared(photos, tmp_path / "data", max_value=4095.0, **options)
        assert "--config.data.max_value=4095" in text and len(source(tmp_path / "data")) == 37


def test_what_was_prepared_before_is_still_known(tmp_path):
    """The fingerprint of a folder without links, and of 8 bits, is that of earlier versions."""
    for split in ("train", "val"):
        for name in ("ape", "bee"):
            path = tmp_path / "photos" / split / name / "0.jpg"
            put(path, b"\xff\xd8\xff and so on")
            os.utime(path, (1_700_000_000, 1_700_000_000))
    prepared(tmp_path / "photos", tmp_path / "data", no_decode=True)
    fingerprint = output.manifest(epath.Path(tmp_path / "data/beasts/1.0.0"))["fingerprint"]
    assert fingerprint == "568e7b99ba164600ca04b9662b7401ff9f0bbef5f4014c970594bb72ef6a1298"
