"""Which features are read, how many files are open, and what the system refuses."""

import contextlib
import errno
import os
import pickle
import resource
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import python
from etils import epath
from pictures import CLASSES, encoded, put, source

from supmim_jax.config import DataConfig, MasksConfig
from supmim_jax.data import sampler
from supmim_jax.data import source as source_module
from supmim_jax.data.prepare import catalogue, folder, output
from supmim_jax.errors import OF_THE_USER, SetupError

F = tfds.features
PICTURE = F.Image(shape=(4, 4, 3), encoding_format="png")
PIXELS = np.zeros((4, 4, 3), np.uint8)
DEPTH = F.Image(shape=(4, 4, 1), dtype=np.float32, encoding_format="png")
FIELDS = {  # of one data set, beside its image: the feature, and what the record has
    "label": (F.Sequence(F.ClassLabel(num_classes=30)), [1, 2]),
    "text": (F.Text(), "ape"),
    "number": (F.Tensor(shape=(), dtype=np.int64), 3),
    "box": (F.BBoxFeature(), F.BBox(0.0, 0.0, 1.0, 1.0)),
    "depth": (DEPTH, np.zeros((4, 4, 1), np.float32)),
    "kind": (F.ClassLabel(num_classes=30), 3),
}
ODD = {
    "labels": {"image": (PICTURE, PIXELS)} | FIELDS,
    "tensor": {"image": (F.Tensor(shape=(4, 4, 3), dtype=np.uint8), PIXELS)},
    "several": {"image": (F.Sequence(PICTURE), [PIXELS, PIXELS])},
    "nested": {"image": ({"left": PICTURE}, {"left": PIXELS})},
    "none": {"picture": (PICTURE, PIXELS)},
}


class Odd(tfds.core.GeneratorBasedBuilder):
    """Features that are not one image with one class."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in ODD]

    def _info(self):
        fields = ODD[self.builder_config.name]
        features = F.FeaturesDict({name: feature for name, (feature, _) in fields.items()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {name: value for name, (_, value) in ODD[self.builder_config.name].items()}


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    directory = tmp_path_factory.mktemp("odd")
    for name in ODD:
        Odd(config=name, data_dir=directory, file_format="array_record").download_and_prepare()
    return str(directory)


@pytest.mark.parametrize(
    ("beside", "field"),
    [("label", x) for x in ("label", "text", "number", "box", "image")]
    + [("mask", x) for x in ("depth", "number")],
)
def test_what_is_no_single_class_or_mask_is_refused_by_name(odd, beside, field):
    named = {"label": {"label_field": field}, "mask": {"masks": MasksConfig(field=field)}}[beside]
    opened = source_module.Source(DataConfig(name="odd/labels", data_dir=odd, **named))
    setting = {"label": "label_field", "mask": r"masks\.field"}[beside]
    with pytest.raises(SetupError, match=rf"{setting} is '{field}'.*'odd/labels'"):
        opened.records("train", beside)


@pytest.mark.parametrize("name", ["tensor", "several", "nested", "none"])
def test_what_is_no_single_image_is_refused_by_name_also_before_it_is_prepared(odd, name, tmp_path):
    with pytest.raises(SetupError, match=rf"odd/{name}.*'image'"):
        source_module.Source(DataConfig(name=f"odd/{name}", data_dir=odd))
    with pytest.raises(SetupError, match=rf"odd/{name}.*'image'"):
        catalogue.prepare(f"odd/{name}", str(tmp_path), "", dry_run=True)
    assert not any(tmp_path.iterdir())


COUNT = 90


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A data set of a shard for each image."""
    root = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "RECORDS_PER_SHARD", 1)
        for i in range(COUNT):
            put(root / "photos" / "train" / CLASSES[i % 3] / f"{i:03d}.png", encoded(i, size=8))
        for name in CLASSES:
            put(root / "photos" / "val" / name / "0.png", encoded(0, size=8))
        folder.prepare(epath.Path(root / "photos"), "many", str(root / "data"))
    return str(root / "data")


FEW = """
import dataclasses, os, resource, sys
from supmim_jax.config import Config, DataConfig, SupervisedConfig
from supmim_jax.data.loader import Dataset
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 256))
if __name__ == "__main__":
    data = DataConfig(name="many", data_dir=sys.argv[1], train_examples=90, num_classes=3,
                      channels=3, image_size=8, eval_resize=8, workers=int(sys.argv[2]))
    cfg = Config(data=data, objective=SupervisedConfig(), batch_size=30, epochs=4)
    fed = Dataset(cfg).train_on_host(range(30))
    batches = [next(fed)]
    # The workers have their limit. This process holds files of the memory that it shares with them.
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
    ids = [i for batch in (*batches, *fed) for i in batch["id"].tolist()]
    print(fed.broken, all(sorted(ids[e:e + 90]) == list(range(90)) for e in range(0, 360, 90)))
    fed.close()
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_more_shards_than_a_process_may_open_files_are_read_without_loss(many, tmp_path, workers):
    script = tmp_path / "few.py"
    script.write_text(FEW)
    out = python(script, many, workers)
    assert out.stdout.split()[-2:] == ["0", "True"], out.stderr


def opened() -> int:
    names = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum("array_record" in os.readlink(name) for name in names if os.path.islink(name))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts files by /proc")
def test_few_files_are_open_at_a_time_and_a_copy_for_a_worker_has_none(many, monkeypatch):
    monkeypatch.setattr(source_module, "most_open", lambda: 5)
    data = source(many, "many")
    before = opened()
    read = [data[i]["image"] for i in range(COUNT)]
    assert 0 < opened() - before <= 5
    again = pickle.loads(pickle.dumps(data.raw))
    assert len(again) == COUNT and opened() - before <= 5
    assert [data[i]["image"] for i in reversed(range(COUNT))] == read[::-1]
    for wrong in (COUNT, -1):
        with pytest.raises(IndexError):
            data[wrong]


def test_parts_of_splits_are_the_records_that_tfds_names(many):
    whole = [record["image"] for record in source(many, "many")]
    wanted = {"train[10:20]": whole[10:20], "train[-7:]+train[:3]": whole[-7:] + whole[:3]}
    for split, images in wanted.items():
        part = source(many, "many", split)
        assert [part[i]["image"] for i in range(len(part))] == images


@pytest.mark.parametrize(("at", "is_found"), [(10, True), (500, False), (990, True)])
def test_checksums_are_of_both_ends_of_a_shard(tmp_path, monkeypatch, at, is_found):
    monkeypatch.setattr(source_module, "SHARD_END", 64)
    shard = tmp_path / "x.array_record-00000-of-00001"
    shard.write_bytes(bytes(1000))
    source_module.write_checksums(epath.Path(tmp_path))
    shard.write_bytes(bytes(at) + b"x" + bytes(999 - at))
    refused = pytest.raises(SetupError, match=rf"{shard.name} is 1000-")
    with refused if is_found else contextlib.nullcontext():
        source_module.check_checksums(epath.Path(tmp_path))


@contextlib.contextmanager
def limit(soft: int):
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_to_what_the_system_allows():
    with limit(256) as hard:
        source_module.allow_many_files()
        most = 2**16 if hard == resource.RLIM_INFINITY else min(hard, 2**16)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == max(most, 256)


def test_no_more_files_is_no_broken_record_and_the_next_read_is_right(many):
    data = source(many, "many")
    held = []
    with limit(max(map(int, os.listdir("/proc/self/fd"))) + 8):
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(SetupError, match=r"many-train.*ulimit -n"):
            data[3]
        with pytest.raises(SetupError, match=r"ulimit -n"):
            sampler.Intact(data, lambda drawn: {})((0, 3))
        with pytest.raises((SetupError, OSError)) as caught:  # nor a damaged data set
            source(many, "many")
        assert "damaged" not in str(caught.value)
        for file in held:
            os.close(file)
    assert data[3]["label"] == source(many, "many")[3]["label"]


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ENFILE, errno.EACCES, errno.ENOENT]
)
def test_a_read_that_the_system_refuses_ends_the_run(many, monkeypatch, number):
    """As a file whose disk or server fails."""
    data = source(many, "many")
    said = f"pread() failed: {os.strerror(number)}; reading x; at byte 64; Could not read"
    failing = mock.Mock(**{"return_value.read.side_effect": RuntimeError(said)})
    with monkeypatch.context() as patch:
        patch.setattr(source_module.array_record_module, "ArrayRecordReader", failing)
        for read in (
            lambda: data[3],
            lambda: sampler.Intact(data, lambda drawn: {})((0, 3)),
            lambda: sampler.EvaluationRecord(data)(3),
        ):
            with pytest.raises(OSError, match="many-train") as caught:
                read()
            assert caught.value.errno == number
    assert data[3]["image"]  # a reader that failed is not kept


def test_which_errors_a_person_must_mend():
    """These end a command with 2, others with 1: they may be gone the next time."""
    assert {errno.EMFILE, errno.EACCES} <= set(OF_THE_USER)
    assert not {errno.EIO, errno.ESTALE, errno.ENOMEM, errno.ENFILE} & set(OF_THE_USER)
