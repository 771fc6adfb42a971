"""Preparing data sets of tfds: TFRecord copies, its catalogue, ImageNet's archives."""

import dataclasses
import hashlib
import io
import tarfile

import pytest
import tensorflow_datasets as tfds
from etils import epath
from pictures import CLASSES, WNIDS, contents, encoded, flip, put, raw, source

from supmim_jax.config import DataConfig
from supmim_jax.data import source as source_module
from supmim_jax.data.prepare import catalogue, shards, tfrecords
from supmim_jax.errors import SetupError


@pytest.mark.parametrize("per_shard", [2**14, 4])
def test_a_converted_copy_has_the_same_records_in_the_same_order(
    toy, tmp_path, monkeypatch, per_shard
):
    import tensorflow as tf

    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", per_shard)
    said = tfrecords.prepare(toy, str(tmp_path / "data"))
    final = tmp_path / "data/toy_pictures/2.3.4"
    new = tfds.builder("toy_pictures", data_dir=tmp_path / "data")
    old = tfds.builder_from_directory(toy)
    assert new.info.file_format.value == "array_record" and "Converted" in said
    assert "--config.data.train_examples=23" in said and "eval_split=test" in said
    stored = tfds.builder_from_directory(final)  # by its files alone
    assert stored.info.features["label"].names == list(CLASSES)
    for split, count in (("train", 23), ("test", 7)):
        paths = [str(path) for path in old.info.splits[split].filepaths]
        assert len(paths) == 4
        wanted = [r.numpy() for path in paths for r in tf.data.TFRecordDataset(path)]
        assert raw(final, split) == wanted and len(wanted) == count
        assert new.info.splits[split].num_examples == count
        assert new.info.splits[split].num_bytes == old.info.splits[split].num_bytes
        assert max(new.info.splits[split].shard_lengths) <= per_shard
    assert len(source(tmp_path / "data", "toy_pictures")) == 23
    assert tfrecords.prepare(toy, str(tmp_path / "data")).startswith("Converted already")


def third(path) -> int:
    """Where the third record of a TFRecord file begins: a length, its CRC, the bytes, their CRC."""
    found, at = path.read_bytes(), 0
    for _ in range(2):
        at += 16 + int.from_bytes(found[at : at + 8], "little")
    return at


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: flip(p, third(p) + 40), r"00001-of-00004: record 2 is damaged or cut"),
        (lambda p: flip(p, third(p)), r"00001-of-00004: record 2 is damaged or cut"),
        (lambda p: p.write_bytes(p.read_bytes()[: third(p) + 20]), r"record 2 is damaged or cut"),
        (lambda p: p.write_bytes(p.read_bytes()[: third(p)]), r"has 2 records, and .* says \d"),
        (lambda p: p.write_bytes(2 * p.read_bytes()), r"has 1\d records, and .* says \d"),
        (lambda p: p.unlink(), r"lacks 1 of 8 files.*\n.*train.tfrecord-00001-of-00004"),
    ],
)
def test_a_damaged_copy_is_answered_by_shard_and_record(toy, tmp_path, harm, message):
    harm(toy / "toy_pictures-train.tfrecord-00001-of-00004")
    with pytest.raises(SetupError, match=message):
        tfrecords.prepare(toy, str(tmp_path / "data"))
    assert not (tmp_path / "data/toy_pictures/2.3.4").exists()


def test_a_repaired_copy_goes_on(toy, toys, tmp_path):
    bad = toy / "toy_pictures-train.tfrecord-00001-of-00004"
    flip(bad, 40)
    with pytest.raises(SetupError, match="record 0 is damaged"):
        tfrecords.prepare(toy, str(tmp_path / "data"))
    bad.write_bytes((toys / "toy_pictures/2.3.4" / bad.name).read_bytes())
    tfrecords.prepare(toy, str(tmp_path / "data"))
    assert len(source(tmp_path / "data", "toy_pictures")) == 23


def test_what_is_no_tfrecord_copy_is_refused(toy, tmp_path):
    where = str(tmp_path / "data")
    with pytest.raises(SetupError, match=r"has no dataset_info\.json.*found: .*2\.3\.4"):
        tfrecords.prepare(toy.parent, where)
    with pytest.raises(SetupError, match=r"none below it"):
        tfrecords.prepare(epath.Path(tmp_path / "nowhere"), where)
    with pytest.raises(SetupError, match=r"is where the ArrayRecord copy would go"):
        tfrecords.prepare(toy, str(tmp_path / "tfrecord"))
    tfrecords.prepare(toy, where)
    with pytest.raises(SetupError, match="holds array_record, expected tfrecord"):
        tfrecords.prepare(epath.Path(where) / "toy_pictures/2.3.4", str(tmp_path / "other"))
    (toy / "features.json").unlink()
    with pytest.raises(SetupError, match=r"no features\.json"):
        tfrecords.prepare(toy, str(tmp_path / "other"))
    (toy / "dataset_info.json").write_text("{")
    with pytest.raises(SetupError, match=r"dataset_info\.json cannot be read"):
        tfrecords.prepare(toy, str(tmp_path / "other"))


def test_a_data_set_of_tfds_is_made_by_its_builder_in_our_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "RECORDS_PER_SHARD", 5)
    said = catalogue.prepare("toy_pictures", str(tmp_path), "")
    info = tfds.builder("toy_pictures", data_dir=tmp_path).info
    assert said.startswith("Prepared:") and "--config.data.name=toy_pictures" in said
    assert info.file_format.value == "array_record"
    assert (info.splits["train"].num_shards, info.splits["test"].num_shards) == (5, 2)
    assert len(source(tmp_path, "toy_pictures")) == 23
    before = contents(tmp_path)
    again = catalogue.prepare("toy_pictures", str(tmp_path), "")
    assert again.startswith("Prepared already") and contents(tmp_path) == before


def test_a_tfrecord_copy_is_pointed_to_the_conversion(toys, tmp_path):
    with pytest.raises(SetupError, match=r"as tfrecord.*--from_tfrecord .*toy_pictures/2\.3\.4"):
        catalogue.prepare("toy_pictures", str(toys), "")
    with pytest.raises(SetupError, match=r"stored as tfrecord.*prepare --from_tfrecord .*2\.3\.4"):
        source(toys, "toy_pictures")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("imagenet21k", r"has no such data set.*--as imagenet21k.*ImageNet-21k.*train/<wnid>"),
        ("cifra100", r"Near it: cifar100"),
        ("fractals/tiny", r"nothing to prepare"),
        ("manual_pictures", r"(?s)downloads/manual has none.*Ask the zoo for\n  beasts\.zip"),
    ],
)
def test_what_tfds_cannot_make_is_answered_by_what_to_do(tmp_path, name, message):
    with pytest.raises(SetupError, match=message):
        catalogue.prepare(name, str(tmp_path), "")
    assert list(tmp_path.iterdir()) == []


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """ImageNet's archives in miniature, and the table as it is for them."""
    directory = tmp_path / "manual"
    classes = {
        f"{wnid}.tar": tar({f"{wnid}_{i}.JPEG": encoded(10 * k + i, ".jpg") for i in range(4)})
        for k, wnid in enumerate(WNIDS)
    }
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": encoded(70 + i, ".jpg") for i in range(1, 6)}
    table = []
    for archive, held in ((catalogue.TRAIN, classes), (catalogue.VALIDATION, images)):
        content = tar(held)
        put(directory / archive.file, content)
        changes = {"size": len(content), "md5": hashlib.md5(content).hexdigest()}
        table.append(dataclasses.replace(archive, members=len(held), **changes))
    monkeypatch.setattr(catalogue, "ARCHIVES", tuple(table))
    return directory


def test_imagenet_is_made_of_its_archives(archives, tmp_path):
    said = catalogue.prepare("imagenet2012", str(tmp_path / "data"), str(archives), verify=True)
    assert "train_examples=12" in said and "num_classes=1000" in said
    builder = tfds.builder("imagenet2012", data_dir=tmp_path / "data")
    found = {e["file_name"].decode(): e["label"] for e in builder.as_data_source("train")}
    labels = builder.info.features["label"].names
    assert {name: labels[label] for name, label in found.items()} == {
        f"{wnid}_{i}.JPEG": wnid for wnid in WNIDS for i in range(4)
    }
    assert builder.info.splits["validation"].num_examples == 5
    cfg = DataConfig(name="imagenet2012", data_dir=str(tmp_path / "data"), num_classes=1000)
    assert source_module.open_source(cfg, "train")[0]["image"][:3] == catalogue.JPEG


def same_size(content: bytes, size: int) -> bytes:
    return content[:size].ljust(size, b"\0")


@pytest.mark.parametrize(
    ("file", "harm", "message"),
    [
        ("train", lambda p: p.unlink(), r"train\.tar: missing, expected [\d,]+ bytes"),
        ("val", lambda p: p.unlink(), r"val\.tar: missing, expected [\d,]+ bytes"),
        ("val", lambda p: put(p, p.read_bytes()[:-1]), r"val\.tar: has [\d,]+ bytes, exp.*: cut"),
        ("train", lambda p: put(p, p.read_bytes() + b"0"), r"train.*: not the official file"),
        ("val", lambda p: put(p, b"x" * p.stat().st_size), r"val\.tar: is no readable tar"),
        ("train", lambda p: put(p, bytes(p.stat().st_size)), r"train\.tar: is an archive without"),
        (
            "train",
            lambda p: put(p, same_size(tar({"a.JPEG": b""}), p.stat().st_size)),
            r"train\.tar: holds 'a\.JPEG', expected names as n",
        ),
        (
            "train",
            lambda p: put(
                p,
                same_size(
                    tar({f"{WNIDS[0]}.tar": tar({"a.JPEG": b"\xff\xd8\xff"})}), p.stat().st_size
                ),
            ),
            r"train\.tar: holds 1 archives, expected 3",
        ),
        (
            "val",
            lambda p: put(
                p, same_size(tar({"ILSVRC2012_val_00000001.JPEG": b"GIF89a"}), p.stat().st_size)
            ),
            r"val\.tar: holds ILSVRC2012_val_00000001.JPEG, which begins with 47",
        ),
        ("train", lambda p: flip(p, 512 + 100), r"train\.tar: is no readable tar|which begins"),
    ],
)
def test_archives_that_are_not_in_order_are_named(archives, tmp_path, file, harm, message):
    harm(archives / f"ILSVRC2012_img_{file}.tar")
    with pytest.raises(SetupError, match=message) as caught:
        catalogue.prepare("imagenet2012", str(tmp_path / "data"), str(archives))
    other = {"train": "val", "val": "train"}[file]
    assert f"{other}.tar:" not in str(caught.value)
    assert "https://image-net.org/download-images" in str(caught.value)
    assert not (tmp_path / "data").exists()


def test_both_archives_are_named_at_once_and_right_sizes_are_not_enough(tmp_path):
    with pytest.raises(SetupError) as caught:
        catalogue.prepare("imagenet2012", str(tmp_path), "")
    assert "train.tar: missing, expected 147,897,477,120" in str(caught.value)
    assert "val.tar: missing, expected 6,744,924,160" in str(caught.value)
    assert f"{tmp_path}/downloads/manual" in str(caught.value)
    for archive in catalogue.ARCHIVES:
        with open(tmp_path / archive.file, "wb") as sparse:
            sparse.truncate(archive.size)
    with pytest.raises(SetupError) as caught:
        catalogue.prepare("imagenet2012", str(tmp_path / "data"), str(tmp_path))
    assert str(caught.value).count("is an archive without files") == 2


def test_verify_reads_every_byte(archives, tmp_path):
    path = archives / "ILSVRC2012_img_val.tar"
    flip(path, path.stat().st_size // 2)
    catalogue.check(epath.Path(archives), verify=False)
    with pytest.raises(SetupError, match=r"val\.tar: has the MD5 \w{32}, expected \w{32}"):
        catalogue.check(epath.Path(archives), verify=True)


def test_a_dry_run_of_the_catalogue_writes_nothing(archives, tmp_path):
    before, where = contents(tmp_path), str(tmp_path / "data")
    for name in ("imagenet2012", "toy_pictures"):
        said = catalogue.prepare(name, where, str(archives), dry_run=True)
        assert f"Would write {where}/{name}/" in said and "Nothing was written" in said
        assert ("1,281,167 records" in said) == (name == "imagenet2012")
    assert contents(tmp_path) == before
