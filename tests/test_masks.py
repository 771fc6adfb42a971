"""Masks beside images, data sets with other fields, and what `probe` makes of them."""

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ONE
from pictures import store

from supmim_jax import probe, sharding
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    DataConfig,
    EvalConfig,
    HeadTrainingConfig,
    MasksConfig,
    ProbeConfig,
    ProbeDataConfig,
    RetrievalConfig,
    SegmentationConfig,
    changed,
)
from supmim_jax.data import decode, fractals, source, transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError


def shapes(count: int):
    """Bright squares: the product is their brightness; masks in red, instances in green."""
    random = np.random.default_rng(count)
    for i in range(count):
        top, left = random.integers(0, 12, 2)
        image, mask = np.zeros((30, 24, 1), np.uint8), np.zeros((30, 24, 3), np.uint8)
        image[top : top + 12, left : left + 12] = 40 * (1 + i % 6)
        mask[..., 0], mask[..., 1] = 1, 7 + i
        mask[top : top + 12, left : left + 12, 0] = 2
        mask[:, 20:, 0] = 0  # doesn't count
        yield i, {"image": image, "annotation": mask, "class_id": i % 6}


@pytest.fixture(scope="module")
def shapes_dir(tmp_path_factory) -> str:
    directory = str(tmp_path_factory.mktemp("masked_shapes"))
    features = {
        "image": tfds.features.Image(shape=(30, 24, 1), encoding_format="png"),
        "annotation": tfds.features.Image(shape=(30, 24, 3), encoding_format="png"),
        "class_id": tfds.features.ClassLabel(num_classes=6),
    }
    store("masked_shapes", features, {"train": shapes(48), "test": shapes(30)}, directory)
    return directory


def test_masks_come_with_their_images_whatever_the_mesh(cfg, one_device):
    """Twice the size, so that a mask that is not in place would show."""
    data = {"masks": {"field": "segmentation"}, "image_size": 40, "eval_resize": 48}
    cfg = changed(cfg, data=data)
    (first, *_), (other, *_) = (
        list(Dataset(cfg).masked("train[:70]", mesh))
        for mesh in (one_device, sharding.make_mesh(cfg.mesh))
    )
    assert first.masks.shape == (64, 40, 40) and first.masks.dtype == np.int32
    assert (np.asarray(first.masks) == np.asarray(other.masks)).all()
    expected = fractals.render(fractals.SPECS["tiny"], "train", range(64))["segmentation"]
    doubled = expected.repeat(2, axis=1).repeat(2, axis=2)[:, 4:-4, 4:-4]
    assert (np.asarray(first.masks) == doubled).all()
    plain = next(Dataset(cfg).eval("train[:70]", one_device))
    assert (np.asarray(first.views[0]) == np.asarray(plain.views[0])).all()
    assert plain.masks is None


@pytest.mark.parametrize(("height", "width", "resize"), [(60, 80, 30), (33, 50, 40), (90, 61, 35)])
def test_a_mask_is_moved_as_its_image_is(height, width, resize):
    cfg = DataConfig(channels=1, image_size=24, eval_resize=resize)
    mask = np.zeros((height, width), np.uint16)
    mask[height // 3 :, width // 4 : -width // 4] = 1000
    moved = transforms.eval_image(mask, cfg, "nearest")
    assert moved.dtype == np.uint16 and set(np.unique(moved)) == {0, 1000}
    image = transforms.eval_image((mask[..., None] > 0).astype(np.uint8) * 200, cfg)[..., 0]
    sure = (image < 20) | (image > 180)
    assert ((image > 100) == (moved > 0))[sure].all() and sure.mean() > 0.8
    # A column or row on the edge may fall either way.
    assert ((image > 100) != (moved > 0)).any(axis=0).sum() <= 1


def test_a_mask_that_is_none_is_refused():
    cfg = DataConfig(name="set", masks=MasksConfig(field="mask"))
    other = cv2.imencode(".png", np.zeros((12, 10), np.uint8))[1].tobytes()
    with pytest.raises(decode.BrokenRecord, match="set record 3: the mask"):
        decode.decode_mask({"mask": b"x"}, (10, 12), cfg, 3)
    with pytest.raises(SetupError, match=r"record 3: the mask has \(12, 10\) pixels, but"):
        decode.decode_mask({"mask": other}, (10, 12), cfg, 3)


def test_a_data_set_of_other_fields_and_without_a_label(initial, shapes_dir):
    """A colour mask whose red channel is 0 (to ignore), 1 and 2; products to retrieve."""
    data = ProbeDataConfig(
        name="masked_shapes",
        data_dir=shapes_dir,
        train_split="train",
        eval_split="test",
        num_classes=6,
        label_field="class_id",
        masks=MasksConfig(field="annotation", num_classes=2, ignore=0, offset=-1),
        eval_resize=20,
    )
    evaluations = EvalConfig(
        batch_size=16,
        which=("top1", "retrieval", "segmentation"),
        retrieval=RetrievalConfig(recalls=(1, 29)),
        segmentation=SegmentationConfig(
            heads=("linear",),
            training=HeadTrainingConfig(steps=150, learning_rate=0.03),
        ),
    )
    asked = ProbeConfig(data=data, eval=evaluations)
    report = probe.probe(Checkpoint.open(initial), asked, devices=ONE)
    labels = [source.Source(report.data).records("test")[i]["label"] for i in range(30)]
    assert labels == [i % 6 for i in range(30)]
    found = report.results.metrics
    # The encoder's 30 classes are not these, so there is no top1.
    assert set(found) == {"recall@1", "recall@29", "map@r", "miou/linear", "pixel_accuracy/linear"}
    assert 25 < found["recall@1"] < 90 and found["recall@29"] == 100
    assert found["miou/linear"] > 50 and found["pixel_accuracy/linear"] > 80

    unlabelled = changed(
        asked,
        data={"label_field": "no_such", "num_classes": 99},
        eval={"which": ("segmentation",), "batch_size": 7},
    )
    again = probe.probe(Checkpoint.open(initial), unlabelled, devices=ONE).results
    assert again.metrics == pytest.approx({name: found[name] for name in again.metrics}, abs=0.1)
    assert len(again.metrics) == 2 and again.details["segmentation"]["trained_on"] == 48
    wrong = changed(asked, data={"masks": {"ignore": -1}})
    with pytest.raises(SetupError, match=r"has pixels of \[0\]; expected are 1 to 2"):
        probe.probe(Checkpoint.open(initial), wrong, devices=ONE)
