"""Preparing data sets of tfds: TFRecord copies, its catalogue, ImageNet's archives."""

import dataclasses
import hashlib
import io
import shutil
import tarfile

import pytest
import tensorflow_datasets as tfds
from etils import epath
from pictures import CLASSES, WNIDS, contents, encoded, flip, put, raw, source

from supmim_jax.config import DataConfig
from supmim_jax.data import source as source_module
from supmim_jax.data.prepare import catalogue, output, tfrecords
from supmim_jax.errors import SetupError


@pytest.mark.parametrize("per_shard", [2**14, 4])
def test_a_converted_copy_has_the_same_records_in_the_same_order(
    toy, tmp_path, monkeypatch, per_shard
):
    import tensorflow as tf

    monkeypatch.setattr(output, "RECORDS_PER_SHARD", per_shard)
    text = tfrecords.prepare(toy, str(tmp_path / "data"))
    final = tmp_path / "data/toy_pictures/2.3.4"
    new, old = tfds.builder_from_directory(final).info, tfds.builder_from_directory(toy).info
    assert "--config.data.train_examples=23" in text and "eval_split=test" in text
    assert new.file_format.value == "array_record"
    assert new.features["label"].names == list(CLASSES)
    for split, count in (("train", 23), ("test", 7)):
        paths = [str(path) for path in old.splits[split].filepaths]
        records = [r.numpy() for path in paths for r in tf.data.TFRecordDataset(path)]
        assert raw(final, split) == records and len(records) == count
        assert new.splits[split].num_bytes == old.splits[split].num_bytes
        assert max(new.splits[split].shard_lengths) <= per_shard
    assert len(source(tmp_path / "data", "toy_pictures")) == 23
    assert tfrecords.prepare(toy, str(tmp_path / "data")).startswith("Converted already")


def third(path) -> int:
    """Where the third record of a TFRecord file begins: a length, its CRC, the bytes, their CRC."""
    content, at = path.read_bytes(), 0
    for _ in range(2):
        at += 16 + int.from_bytes(content[at : at + 8], "little")
    return at


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: flip(p, third(p) + 40), r"00001-of-00004: record 2 is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[: third(p) + 20]), r"record 2 is damaged"),
        (lambda p: p.write_bytes(p.read_bytes()[: third(p)]), r"has 2 records, and .* says \d"),
        (lambda p: p.write_bytes(2 * p.read_bytes()), r"has 1\d records, and .* says \d"),
        (lambda p: p.unlink(), r"1 of 8 files.*\n.*train.tfrecord-00001-of-00004"),
    ],
)
def test_a_damaged_copy_is_answered_by_shard_and_record_and_goes_on_once_repaired(
    toy, toys, tmp_path, harm, message
):
    path = toy / "toy_pictures-train.tfrecord-00001-of-00004"
    harm(path)
    with pytest.raises(SetupError, match=message):
        tfrecords.prepare(toy, str(tmp_path / "data"))
    assert not (tmp_path / "data/toy_pictures/2.3.4").exists()
    path.write_bytes((toys / "toy_pictures/2.3.4" / path.name).read_bytes())
    tfrecords.prepare(toy, str(tmp_path / "data"))
    assert len(source(tmp_path / "data", "toy_pictures")) == 23


def test_a_copy_that_names_a_class_of_other_code_is_refused(toy, tmp_path):
    copy = shutil.copytree(toy, tmp_path / "toy")
    features = copy / "features.json"
    features.write_text(features.read_text().replace("tensorflow_datasets.", "mine.", 1))
    with pytest.raises(SetupError, match=r"features\.json names the class 'mine\."):
        tfrecords.prepare(epath.Path(copy), str(tmp_path / "out"))


def test_what_is_no_tfrecord_copy_is_refused(toy, tmp_path):
    data = str(tmp_path / "data")

    def refused(directory, data_dir, message):
        with pytest.raises(SetupError, match=message):
            tfrecords.prepare(epath.Path(directory), data_dir)

    refused(toy.parent, data, r"dataset_info\.json.*toy_pictures/2\.3\.4")
    refused(tmp_path / "nowhere", data, "nowhere has no dataset_info")
    refused(toy, str(tmp_path / "tfrecord"), r"is where the ArrayRecord copy would go")
    tfrecords.prepare(toy, data)
    refused(f"{data}/toy_pictures/2.3.4", str(tmp_path / "other"), "array_record, expected tfrec")
    (toy / "features.json").unlink()
    refused(toy, str(tmp_path / "other"), r"no features\.json")
    (toy / "dataset_info.json").write_text("{")
    refused(toy, str(tmp_path / "other"), r"dataset_info\.json cannot be read")


def test_a_data_set_of_tfds_is_made_by_its_builder_in_our_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "RECORDS_PER_SHARD", 5)
    text = catalogue.prepare("toy_pictures", str(tmp_path), "")
    info = tfds.builder("toy_pictures", data_dir=tmp_path).info
    assert text.startswith("Prepared:") and "--config.data.name=toy_pictures" in text
    assert info.file_format.value == "array_record"
    assert (info.splits["train"].num_shards, info.splits["test"].num_shards) == (5, 2)
    assert len(source(tmp_path, "toy_pictures")) == 23
    before = contents(tmp_path)
    again = catalogue.prepare("toy_pictures", str(tmp_path), "")
    assert again.startswith("Prepared already") and contents(tmp_path) == before


def test_a_tfrecord_copy_is_pointed_to_the_conversion(toys):
    with pytest.raises(SetupError, match=r"as tfrecord.*--from_tfrecord .*toy_pictures/2\.3\.4"):
        catalogue.prepare("toy_pictures", str(toys), "")
    with pytest.raises(SetupError, match=r"as tfrecord.*--from_tfrecord .*2\.3\.4"):
        source(toys, "toy_pictures")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet21k", r"train/<wnid>.*--as imagenet21k"),
        ("cifra100", r"cifar100"),
        ("fractals/tiny", r"nothing to prepare"),
        ("manual_pictures", r"(?s)downloads/manual has none.*Ask the zoo for\n  beasts\.zip"),
    ],
)
def test_what_tfds_cannot_make_is_answered_by_what_to_do(tmp_path, name, message):
    with pytest.raises(SetupError, match=message):
        catalogue.prepare(name, str(tmp_path), "")
    assert list(tmp_path.iterdir()) == []


def tar(files: dict[str, bytes], size: int = 0) -> bytes:
    """An archive, cut or filled up to a size if one is given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    content = out.getvalue()
    return content[:size].ljust(size, b"\0") if size else content


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's archives in miniature, and the table as it is for them."""
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": encoded(10 * k + i, ".jpg") for i in range(4)})
        for k, wnid in enumerate(WNIDS)
    }
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": encoded(70 + i, ".jpg") for i in range(1, 6)}
    table = []
    for archive, members in ((catalogue.TRAIN, classes), (catalogue.VALIDATION, images)):
        content = tar(members)
        put(tmp_path / "manual" / archive.file, content)
        changes = {"size": len(content), "md5": hashlib.md5(content).hexdigest()}
        if archive.classes:
            changes["classes"] = len(members)
        table.append(dataclasses.replace(archive, **changes))
    monkeypatch.setattr(catalogue, "ARCHIVES", tuple(table))
    return epath.Path(tmp_path / "manual")


def test_imagenet_is_made_of_its_archives(archives, tmp_path):
    text = catalogue.prepare("imagenet2012", str(tmp_path / "data"), str(archives), verify=True)
    assert "train_examples=12" in text and "num_classes=1000" in text
    builder = tfds.builder("imagenet2012", data_dir=tmp_path / "data")
    names = builder.info.features["label"].names
    labels = {
        example["file_name"].decode(): names[example["label"]]
        for example in builder.as_data_source("train")
    }
    assert labels == {f"{wnid}_{i}.JPEG": wnid for wnid in WNIDS for i in range(4)}
    assert builder.info.splits["validation"].num_examples == 5
    cfg = DataConfig(name="imagenet2012", data_dir=str(tmp_path / "data"), num_classes=1000)
    assert source_module.Source(cfg).records("train")[0]["image"][:3] == catalogue.JPEG


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("train", None, r"missing, expected [\d,]+ bytes"),
        ("val", lambda old: old[:-1], r"has [\d,]+ bytes, expected [\d,]+: cut"),
        ("train", lambda old: old + b"0", r"has [\d,]+ bytes.*: not the official file"),
        ("val", lambda old: b"x" * len(old), r"is no readable tar"),
        ("train", lambda old: bytes(len(old)), r"is an archive without files"),
        ("train", lambda old: tar({"a.JPEG": b""}, len(old)), r"holds 'a\.JPEG', expected"),
        (
            "train",
            lambda old: tar({f"{WNIDS[0]}.tar": tar({"a": catalogue.JPEG})}, len(old)),
            r"holds 1 archives, expected 3",
        ),
        (
            "val",
            lambda old: tar({"ILSVRC2012_val_00000001.JPEG": b"GIF89a"}, len(old)),
            r"holds ILSVRC2012_val_00000001.JPEG, which begins with 47",
        ),
    ],
)
def test_archives_that_are_not_in_order_are_named(archives, tmp_path, file, harm, message):
    path = archives / f"ILSVRC2012_img_{file}.tar"
    path.write_bytes(harm(path.read_bytes())) if harm else path.unlink()
    with pytest.raises(SetupError, match=rf"{file}\.tar: {message}") as caught:
        catalogue.prepare("imagenet2012", str(tmp_path / "data"), str(archives))
    other = {"train": "val", "val": "train"}[file]
    assert f"{other}.tar:" not in str(caught.value) and not (tmp_path / "data").exists()


def test_both_archives_are_named_at_once(tmp_path):
    with pytest.raises(SetupError) as caught:
        catalogue.prepare("imagenet2012", str(tmp_path), "")
    assert "train.tar: missing, expected 147,897,477,120" in str(caught.value)
    assert "val.tar: missing, expected 6,744,924,160" in str(caught.value)
    assert f"{tmp_path}/downloads/manual" in str(caught.value)


def test_verify_reads_every_byte(archives):
    path = archives / "ILSVRC2012_img_val.tar"
    flip(path, path.stat().length // 2)
    catalogue.check_archives(archives, verify=False)
    with pytest.raises(SetupError, match=r"val\.tar: has the MD5 \w{32}, expected \w{32}"):
        catalogue.check_archives(archives, verify=True)


def test_a_dry_run_of_the_catalogue_writes_nothing(archives, tmp_path):
    before, data = contents(tmp_path), str(tmp_path / "data")
    for name in ("imagenet2012", "toy_pictures"):
        plan = catalogue.prepare(name, data, str(archives), dry_run=True)
        assert f"Would write {data}/{name}/" in plan
        assert ("1,281,167 records" in plan) == (name == "imagenet2012")
    assert contents(tmp_path) == before
