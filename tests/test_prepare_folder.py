"""Preparing a folder of images."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from pictures import CLASSES, WNIDS, contents, encoded, put, raw, source

from supmim_jax.config import SetupError, SupervisedConfig
from supmim_jax.data import pipeline
from supmim_jax.data.prepare import (
    files,
    folder,
    layout,
)
from supmim_jax.train import train


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
    said = folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    for split, directory, count in (("train", "train", 36), ("validation", "val", 9)):
        opened = source(tmp_path / "data", split=split)
        paths = sorted(
            (path.relative_to(photos).as_posix() for path in (photos / directory).rglob("*.*")),
            key=lambda name: (name.split("/")[1], name),
        )
        paths = [path for path in paths if "notes" not in path and "hidden" not in path]
        assert len(opened) == len(paths) == count
        builder = tfds.builder("beasts", data_dir=tmp_path / "data")
        names = [example["file_name"].decode() for example in builder.as_data_source(split)]
        assert names == paths
        for i, path in enumerate(paths):
            assert opened[i]["image"] == (photos / path).read_bytes()
            assert CLASSES[opened[i]["label"]] == path.split("/")[1]
    info = builder.info
    assert tuple(info.features["label"].names) == CLASSES
    assert info.supervised_keys == ("image", "label") and str(info.version) == "1.0.0"
    total = sum(len(record) for record in raw(tmp_path / "data/beasts/1.0.0", "train"))
    assert total <= info.splits["train"].num_bytes <= total + 30 * 36
    for part in ("name=beasts", "num_classes=3", "train_examples=36", "data_dir=" + str(tmp_path)):
        assert f"--config.data.{part}" in said
    assert "eval_split" not in said and "label_field" not in said
    again = folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    assert "Prepared already" in again


def test_records_are_the_same_bytes_in_any_process():
    make = folder.examples(CLASSES)
    for i in range(100):
        record = make({"image": encoded(0), "label": i % 3, "file_name": f"{i}.png"})
        places = [record.index(name) for name in (b"file_name", b"image", b"label")]
        assert places == sorted(places)


def test_a_run_trains_on_a_folder(photos, tmp_path, cfg, one_device):
    folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    data = dataclasses.replace(
        cfg.data,
        name="beasts",
        data_dir=str(tmp_path / "data"),
        train_split="train",
        train_examples=36,
        num_classes=3,
    )
    run = dataclasses.replace(cfg, data=data, objective=SupervisedConfig(), epochs=1, batch_size=16)
    opened = source(tmp_path / "data")
    for batch in pipeline.train_dataset(run, one_device):
        labels = [opened[int(i)]["label"] for i in np.asarray(batch.id)]
        assert np.asarray(batch.label).tolist() == labels
    assert run.total_steps == 2
    results = train(run, tmp_path / "run", devices=jax.devices()[:1])
    assert 0 <= results["top1"] <= 100


def test_tiny_imagenet_is_recognised(tiny, tmp_path):
    folder.prepare(epath.Path(tiny), "tiny_imagenet", str(tmp_path / "data"))
    builder = tfds.builder("tiny_imagenet", data_dir=tmp_path / "data")
    assert tuple(builder.info.features["label"].names) == WNIDS
    assert {s: i.num_examples for s, i in builder.info.splits.items()} == {
        "train": 12,
        "validation": 6,
    }
    found = {e["file_name"].decode(): e["label"] for e in builder.as_data_source("validation")}
    assert found == {f"val/images/val_{i}.JPEG": (i + 1) % 3 for i in range(6)}
    assert list(found.values()) == [0, 0, 1, 1, 2, 2]


def test_a_fraction_for_validation_is_of_each_class_and_stable(photos, tmp_path):
    shutil.rmtree(photos / "val")
    before = layout.read(epath.Path(photos), 0.25).splits
    for split, count in (("train", 9), ("validation", 3)):
        assert [file.label for file in before[split]] == [0] * count + [1] * count + [2] * count
    assert {f.name for f in before["train"]}.isdisjoint(f.name for f in before["validation"])
    ape = [f for of in before.values() for f in of if f.label == 0]
    chosen = {f.name for f in before["validation"] if f.label == 0}
    assert chosen != {f.name for f in sorted(ape, key=lambda f: f.name)[:3]}  # a hash chooses
    for i in range(5):
        put(photos / "train" / "dog" / f"{i}.png", encoded(i))
    put(photos / "train" / "eel" / "0.png", encoded(0))
    after = layout.read(epath.Path(photos), 0.25).splits
    for split, new in (("train", 5), ("validation", 1)):
        old = [f.name for f in after[split] if f.label < 3]
        assert old == [f.name for f in before[split]]
        assert len(after[split]) == len(old) + new
    assert after["train"][-1].name == "train/eel/0.png"  # a single image is for training


def link(path, to) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(to)


def annotate(root, line: str) -> None:
    path = root / "val" / "val_annotations.txt"
    path.write_text(path.read_text() + line)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: shutil.rmtree(r), r"is no directory"),
        (lambda r: (r / "train").rename(r / "training"), r"has no directory train/\. Expected"),
        (lambda r: shutil.rmtree(r / "val"), r"neither val/ nor validation/\. Give --val_fraction"),
        (lambda r: put(r / "validation/ape/0.png"), r"has both val/ and validation/"),
        (lambda r: (r / "train/dog").mkdir(), r"no images of 1 of 4 classes: dog.*Fill or remove"),
        (lambda r: put(r / "val/dog/0.png"), r"val has 1 classes that .*/train lacks: dog"),
        (lambda r: put(r / "test/dog/0.png"), r"test has 1 classes that .*/train lacks: dog"),
        (lambda r: put(r / "train/0.png"), r"train/0\.png is in no class .*<class>/0\.png"),
        (lambda r: put(r / "test/0.png"), r"test/0\.png is in no class"),
        (lambda r: [shutil.rmtree(r / "train" / c) for c in CLASSES], r"train has no images"),
        (lambda r: [shutil.rmtree(r / "val" / c) for c in CLASSES], r"val has no images"),
        (
            lambda r: [shutil.rmtree(r / s / c) for c in CLASSES[1:] for s in ("train", "val")],
            r"has one class, 'ape'",
        ),
        (
            lambda r: link(r / "train/ape/x.png", "/etc/hostname"),
            r"x\.png is a symbolic link to "
            r"/etc/hostname, which is outside",
        ),
        (lambda r: link(r / "train/dog", "/usr"), r"symbolic link to /usr, which is outside"),
        (
            lambda r: link(r / "train/ape/up", r / "train"),
            r"link to .*, a directory above it",
        ),
        (lambda r: (r / "train/ape").rename(r / "train/a\npe"), r"is named 'a\\npe'"),
        (lambda r: (r / "train/ape").rename(r / "train/a..pe"), r"is named 'a\.\.pe'"),
        (lambda r: (r / "train/ape").rename(r / "train/a\\pe"), r"is named 'a\\\\pe'"),
        (lambda r: (r / "train/ape").rename(r / "train/ape "), r"is named 'ape '"),
        (lambda r: os.rename(r / "train/ape", os.fsencode(r / "train") + b"/\xff"), r"is named '"),
        (lambda r: os.rename(r / "val/ape/0.Png", r / "val/ape/\n.png"), r"is named '\\n\.png'"),
        (
            lambda r: ((r / "val").rename(r / "../away"), link(r / "val", r / "../away")),
            r"val is a symbolic link to .*away, which is outside",
        ),
        (lambda r: put(r / "val/val_annotations.txt", "x"), r"but no wnids\.txt"),
    ],
)
def test_a_folder_that_cannot_be_used_is_answered_by_what_to_change(
    photos, tmp_path, change, message
):
    change(photos)
    with pytest.raises(SetupError, match=message):
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: annotate(r, f"val_6.JPEG\t{WNIDS[0]}\n"), r"line 7 names 'val_6\.JPEG', which"),
        (lambda r: annotate(r, f"val_0.JPEG\t{WNIDS[0]}\n"), r"line 7 names 'val_0\.JPEG'"),
        (
            lambda r: (put(r / "val/images/val_6.JPEG"), annotate(r, "val_6.JPEG\tn00000000\n")),
            r"val_annotations\.txt, line 7 names 'n00000000', which wnids\.txt lacks",
        ),
        (lambda r: annotate(r, f"../../x\t{WNIDS[0]}\n"), r"line 7 names '\.\./\.\./x'"),
        (lambda r: put(r / "val/images/val_6.JPEG"), r"no line for 1 files.*val_6\.JPEG"),
        (lambda r: put(r / "val/n01440764/0.JPEG"), r"two layouts at once"),
        (lambda r: put(r / "wnids.txt", "\n".join(WNIDS[1:])), r"lacks: n01440764"),
        (lambda r: put(r / "wnids.txt", "\n".join((*WNIDS, "n1"))), r"no images of 1 of 4.*n1"),
        (lambda r: put(r / "wnids.txt", "\n".join((*WNIDS, WNIDS[0]))), r"'n01440764' twice"),
        (lambda r: put(r / "wnids.txt", "../x"), r"line 1 of .*wnids\.txt is named '\.\./x'"),
    ],
)
def test_a_wrong_tiny_imagenet_is_answered_by_the_line(tiny, tmp_path, change, message):
    change(tiny)
    with pytest.raises(SetupError, match=message):
        folder.prepare(epath.Path(tiny), "beasts", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_links_within_the_folder_are_followed(photos):
    link(photos / "train/ape/again.png", photos / "train/bee/03.png")
    assert len(layout.read(epath.Path(photos)).splits["train"]) == 37


@pytest.mark.parametrize("name", ["", "Beasts", "a b", "../x", "a/b", "a.b", "_x", "1a", "a__b"])
def test_names_that_tfds_could_not_open_are_refused(photos, tmp_path, name):
    with pytest.raises(SetupError, match=r"--as is .*small|--as is .*letters"):
        folder.prepare(epath.Path(photos), name, str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["fractals", "mnist", "toy_pictures"])
def test_names_of_tfds_are_refused(photos, tmp_path, name):
    with pytest.raises(SetupError, match=f"data set of its own in tfds.*my_{name}"):
        folder.prepare(epath.Path(photos), name, str(tmp_path / "data"))


def test_files_that_are_no_images_are_listed_and_stop_it_or_are_left_out(photos, tmp_path):
    whole = encoded(0, ".jpg", 64)
    put(photos / "train/ape/empty.png")
    put(photos / "train/bee/text.jpg", "%PDF-1.4")
    put(photos / "train/cow/cut.jpg", whole[: len(whole) // 2])
    put(photos / "val/cow/cut.png", encoded(0)[:300])
    root, data = epath.Path(photos), str(tmp_path / "data")
    with pytest.raises(SetupError) as caught:
        folder.prepare(root, "beasts", data)
    said = str(caught.value)
    assert "4 of 49 files" in said and "--skip_broken" in said
    for row in (
        "train/ape/empty.png is empty",
        "train/bee/text.jpg begins with 25 50 44 46",
        "train/cow/cut.jpg cannot be decoded",
        "val/cow/cut.png cannot be decoded",
    ):
        assert row in said
    assert not (tmp_path / "data").exists()
    with pytest.raises(SetupError, match="2 of 49 files"):
        folder.prepare(root, "beasts", data, decode=False)
    said = folder.prepare(root, "beasts", data, skip_broken=True)
    assert "Left out, being no images: 4" in said and "text.jpg" in said
    assert len(source(data)) == 36 and len(source(data, split="validation")) == 9
    assert "text.jpg" in folder.prepare(root, "beasts", data, skip_broken=True)


def test_a_long_list_of_broken_files_is_cut_and_a_class_of_them_alone_is_refused(photos, tmp_path):
    for i in range(25):
        put(photos / f"train/dog/{i:02d}.png", "nothing")
    with pytest.raises(SetupError) as caught:
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path))
    assert str(caught.value).count("train/dog") == 20 and "and 5 more" in str(caught.value)
    with pytest.raises(SetupError, match="train has no images of dog"):
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path), skip_broken=True)


def test_what_is_prepared_is_not_replaced_by_another_folder(photos, tmp_path):
    root, data = epath.Path(photos), str(tmp_path / "data")
    folder.prepare(root, "beasts", data)
    before = contents(tmp_path / "data")
    put(photos / "train/ape/new.png", encoded(7))
    with pytest.raises(SetupError, match=r"already holds a data set \(made of .*photos\).*--as"):
        folder.prepare(root, "beasts", data)
    assert contents(tmp_path / "data") == before


def test_a_file_that_changes_meanwhile_is_an_error(photos, tmp_path, monkeypatch):
    check = files.faults

    def then_change(*arguments):
        found = check(*arguments)
        put(photos / "train/bee/01.JPG", encoded(3, ".jpg", 30))
        return found

    monkeypatch.setattr(files, "faults", then_change)
    with pytest.raises(SetupError, match=r"01\.JPG has \d+ bytes now and had \d+"):
        folder.prepare(epath.Path(photos), "beasts", str(tmp_path / "data"))
    assert not (tmp_path / "data/beasts/1.0.0").exists()
