"""Records that cannot be read or decoded: what stands in for them, and who is told."""

import dataclasses
import io
import json
import shutil
import time
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from conftest import ONE
from pictures import store

from supmim_jax import encoder, evals, sharding
from supmim_jax.batch import Features
from supmim_jax.config import CMAEConfig, DataConfig, MeshConfig, changed
from supmim_jax.data import decode, sampler
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import features as features_module
from supmim_jax.train import train

pytestmark = pytest.mark.usefixtures("build_once")

EXAMPLES, BROKEN = 40, (3, 4, 17, 39)
STAND_IN = {3: 5, 4: 5, 17: 18, 39: 0}


def examples():
    """Plain images whose brightness is their id; those of BROKEN are no images."""
    for i in range(EXAMPLES):
        image = cv2.imencode(".png", np.full((24, 24), i, np.uint8))[1].tobytes()
        mask = cv2.imencode(".png", np.full((24, 24), i % 4, np.uint8))[1].tobytes()
        encoded = io.BytesIO(b"no image" if i in BROKEN else image)
        yield i, {"image": encoded, "label": i % 30, "segmentation": io.BytesIO(mask)}


@pytest.fixture(scope="module")
def damaged_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("damaged"))
    grey = tfds.features.Image(shape=(None, None, 1), encoding_format="png")
    label = tfds.features.ClassLabel(num_classes=30)
    features = {"image": grey, "label": label, "segmentation": grey}
    store("damaged", features, {"train": examples(), "validation": examples()}, directory)
    return directory


@pytest.fixture
def run(cfg, damaged_dir):
    data = DataConfig(
        name="damaged", data_dir=damaged_dir, train_examples=EXAMPLES, max_broken=0.2, flip=False
    )
    return dataclasses.replace(cfg, data=data, epochs=4, batch_size=8)


def replaced(order) -> list[int]:
    """Records that were replaced up to the end of each step."""
    return np.cumsum([order(i)[1] in BROKEN for i in range(4 * EXAMPLES)])[7::8].tolist()


@pytest.fixture
def said(monkeypatch) -> list[str]:
    found = []
    monkeypatch.setattr(logging, "error", lambda text, *args: found.append(text % args))
    return found


def drawn(cfg, mesh, first: int = 0):
    """(id, label, brightness) of each example, in order."""
    found = []
    for batch in Dataset.open(cfg).train(mesh, first):
        pixels = np.asarray(batch.views[0])
        assert (pixels == pixels[:, :1, :1]).all()
        found += zip(*(np.asarray(x).tolist() for x in (batch.id, batch.label, pixels[:, 0, 0, 0])))
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_record_that_is_whole_stands_in_for_a_broken_one(run, one_device, workers):
    run = changed(run, data={"workers": workers})
    found = drawn(run, one_device)
    order = sampler.TrainingOrder(EXAMPLES, run.seed)
    wanted = [order(i)[1] for i in range(4 * EXAMPLES)]
    ids = [STAND_IN.get(i, i) for i in wanted]
    assert found == [(i, i % 30, i) for i in ids] and set(BROKEN) <= set(wanted)
    assert drawn(run, sharding.make_mesh(MeshConfig()), first=7) == found[7 * 8 :]


def test_they_are_counted_and_named_once_and_a_resumed_run_goes_on_counting(run, tmp_path, said):
    expected = replaced(sampler.TrainingOrder(EXAMPLES, run.seed))
    assert expected[-1] == 16
    train(run, tmp_path, stop_at=13, devices=ONE)
    of_training = [line for line in said if "stands in" in line]
    assert sorted(int(line.split()[1]) for line in of_training) == list(BROKEN)
    assert "Record 17 of damaged, split train, is" in " ".join(said)
    train(run, tmp_path, devices=ONE)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    counts = {line["step"]: line["broken_records"] for line in lines if "broken_records" in line}
    assert counts.keys() >= {2, 12, 14, 20}
    assert all(expected[step - 1] == count for step, count in counts.items())


def test_over_a_restart_they_are_counted_when_they_are_taken(run, one_device, said):
    """Of batches that were made ahead and dropped none counts, and none is named again."""
    run = dataclasses.replace(run, objective=CMAEConfig())
    run = changed(run, data={"crop": "contrastive", "max_broken": 1.0})
    order = sampler.TrainingOrder(EXAMPLES, run.seed)
    batches, counts = Dataset.open(run).train(one_device, broken=100), []
    for step in range(1, run.total_steps + 1):
        batch = next(batches)
        ids = [STAND_IN.get(i, i) for i in (order(8 * step - 8 + row)[1] for row in range(8))]
        assert np.asarray(batch.id).tolist() == ids
        counts.append(batches.broken(run.total_steps) - 100)
        if step in (6, 13):
            time.sleep(0.3)  # later batches are made
            batches.restart(step, np.full((EXAMPLES, 4), 10 * step, np.uint8))
            assert batches.broken(run.total_steps) - 100 == counts[-1]
    assert counts == replaced(order) and counts[-1] == 16
    assert sorted(int(line.split()[1]) for line in said) == list(BROKEN)
    batches.close()


def test_a_run_stops_above_the_rate_and_keeps_its_checkpoint(run, tmp_path):
    with pytest.raises(SetupError, match=r"4 of \d+ records of 'damaged'"):
        train(changed(run, data={"max_broken": 0.09}), tmp_path, devices=ONE)
    saved = [p.name for p in Path(tmp_path, "checkpoints").iterdir()]
    train(run, tmp_path, devices=ONE)  # what is allowed may change
    assert all(name.isdecimal() for name in saved)
    assert json.loads((tmp_path / "results.json").read_text())["epochs"] == 4


def test_an_evaluation_counts_a_broken_image_as_an_unknown_one(run, one_device, said):
    batch = next(Dataset(run).eval("validation", one_device))
    pixels, ids = np.asarray(batch.views[0]), np.asarray(batch.id)
    assert ids[:EXAMPLES].tolist() == list(range(EXAMPLES)) and batch.weight.sum() == EXAMPLES
    for i in range(EXAMPLES):
        assert (pixels[i] == (128 if i in BROKEN else i)).all()
    assert len(said) == len(BROKEN) and all("it counts as a grey image" in x for x in said)
    runner = encoder.build_encoder(run, 64, one_device)
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), runner.params)
    found = evals.run_all(runner.bind(params), Dataset(run), "validation", one_device).metrics
    assert found["top1"] == pytest.approx(100 * 2 / EXAMPLES)  # class 0: ids 0 and 30
    run = changed(run, data={"masks": {"field": "segmentation", "num_classes": 4}})
    whole = next(Dataset(run).whole("train", one_device))
    assert (np.asarray(whole.views[0]) == pixels).all() and whole.weight.sum() == EXAMPLES
    masked = np.asarray(next(Dataset(run).masked("validation", one_device)).masks)
    for i in range(EXAMPLES):
        assert (masked[i] == (-1 if i in BROKEN else i % 4)).all()


class AllOnes:
    """An encoder for which all images are alike."""

    def features(self, images) -> Features:
        return Features(np.ones((len(images), 2), np.float32), None)


def test_a_flipped_bit_in_a_file_is_a_broken_record(run, one_device, tmp_path):
    """ArrayRecord's checksums find it; in these files each record has its own."""
    copy = tmp_path / "damaged" / "1.0.0"
    shutil.copytree(Path(run.data.data_dir, "damaged", "1.0.0"), copy)
    (file,) = copy.glob("*train*")
    contents = ArrayRecordReader(str(file)).read_all()
    writer = ArrayRecordWriter(str(file), "group_size:1,uncompressed")
    for record in contents:
        writer.write(record)
    writer.close()
    content = bytearray(file.read_bytes())
    content[content.index(contents[10]) + 20] ^= 16
    file.write_bytes(bytes(content))
    dataset = Dataset(changed(run, data={"data_dir": str(tmp_path)}))
    records = dataset.training_records()
    with pytest.raises(decode.BrokenRecord, match=r"Record 10 .* hash mismatch"):
        records[10]
    assert [records[i]["label"] for i in (9, 11)] == [9, 11]
    (batch,) = dataset.eval("train", one_device)
    ids, weight = np.asarray(batch.id), np.asarray(batch.weight)
    assert weight[10] == 0 and weight.sum() == EXAMPLES - 1
    assert ids.tolist() == [*range(EXAMPLES), *[-1] * (len(ids) - EXAMPLES)]
    extracted = features_module.extract(AllOnes(), dataset.eval("train", one_device))
    assert extracted.id.tolist() == [i for i in range(EXAMPLES) if i != 10]
    whole = [i for i in range(EXAMPLES) if i not in (10, *BROKEN)]
    assert dataset.first_images(10)[:, 0, 0, 0].tolist() == whole[:10]
    examples = drawn(dataset.cfg, one_device)
    assert len(examples) == 160 and {i for i, _, _ in examples} == set(whole)


def test_no_end_of_broken_records_is_an_error(run):
    class Nothing:
        def __len__(self):
            return 50

        def __getitem__(self, index):
            raise decode.BrokenRecord(f"record {index} is gone")

    with pytest.raises(SetupError, match=r"16 records .* record 2 is gone .*17"):
        sampler.Intact(Nothing(), lambda given: {})((0, 2))
