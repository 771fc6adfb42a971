"""Transforms and global batches."""

import dataclasses
import time

import cv2
import jax
import numpy as np
import pytest
import tensorflow as tf
from conftest import python, same
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp
from test_contrastive_crop import drawn

from supmim_jax import sharding
from supmim_jax.config import DataConfig, MeshConfig, changed
from supmim_jax.data import loader, sampler, transforms
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError

NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
PHOTO = cv2.resize(NOISE, (80, 60), interpolation=cv2.INTER_CUBIC) // 2 + 40  # low contrast
CFG = DataConfig(channels=3, image_size=32, eval_resize=32, crop="inception")


def of(image: np.ndarray) -> dict:
    return {"image": cv2.imencode(".png", image[..., ::-1])[1].tobytes(), "label": 5}


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_a_permutation(examples, seed, epoch):
    order = sampler.TrainingOrder(examples, seed)
    found = [order(epoch * examples + place) for place in range(examples)]
    assert sorted(found) == [(epoch, i) for i in range(examples)]


def test_epochs_and_seeds_are_shuffled_differently():
    ids = [[sampler.TrainingOrder(50, seed)(i)[1] for i in range(150)] for seed in range(3)]
    assert len(np.unique(np.reshape(ids, (9, 50)), axis=0)) == 9


def stream(cfg, mesh, first=0) -> list:
    return [jax.tree.map(np.asarray, b) for b in Dataset.open(cfg).train(mesh, first)]


def test_batches_are_the_same_on_any_mesh_by_workers_and_after_a_restart(cfg, one_device):
    whole = stream(cfg, one_device)
    assert len(whole) == cfg.total_steps == 12
    ids = np.concatenate([b.id for b in whole]).reshape(3, 64)
    assert (np.sort(ids) == range(64)).all()
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    in_processes = stream(changed(cfg, data={"workers": 2}), one_device)
    others = [(stream(cfg, mesh), 0), (stream(cfg, one_device, 5), 5), (in_processes, 0)]
    assert all(same(whole[first:], other) for other, first in others)


def test_no_more_batches_are_decoded_ahead_than_the_config_says(cfg, one_device, monkeypatch):
    decoded, decoding = [], transforms.decode_image
    monkeypatch.setattr(transforms, "decode_image", lambda *a: (decoded.append(1), decoding(*a))[1])
    batches = Dataset.open(dataclasses.replace(cfg, epochs=20)).train(one_device)
    next(batches)
    time.sleep(1.0)
    most = 2 + loader.ON_DEVICES + cfg.data.prefetch + cfg.data.threads  # one taken, one placed
    assert cfg.batch_size <= len(decoded) <= most * cfg.batch_size
    batches.close()


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("supmim_jax.data.source, supmim_jax.data.transforms", {"tensorflow", "clu"}),
        ("supmim_jax.data.fractals", {"tensorflow", "jax"}),
        ("supmim_jax.data.prepare.__main__", {"tensorflow"}),
    ],
)
def test_importing_code_of_workers_and_of_data_prepare_is_light(modules, heavy):
    code = f"import sys, {modules}; print({heavy} & set(sys.modules))"
    out = python("-c", code)
    assert out.stdout.strip() == "set()", out.stderr


def test_evaluation_counts_every_example_once(cfg, one_device):
    cfg = changed(cfg, eval={"batch_size": 48})
    batches = list(Dataset(cfg).eval("validation[:100]", one_device))
    ids, weight = (np.concatenate([getattr(b, x) for b in batches]) for x in ("id", "weight"))
    assert ids.tolist() == [*range(100), *[-1] * 44]
    assert weight.sum() == 100 and (weight[:100] == 1).all()


def test_an_examples_image_depends_on_seed_epoch_and_id_alone():
    cfg = dataclasses.replace(CFG, augment="rand_augment")

    def make(seed, epoch, example, views=100):
        return transforms.TrainExample(cfg, seed, views, True)((epoch, example, of(PHOTO)))

    found = make(1, 2, 3)
    assert found["image"].shape == (32, 32, 3) and found["label"] == 5 and found["id"] == 3
    assert all((make(1, 2, 3)[k] == found[k]).all() for k in ("image", "target"))
    for other in (make(1, 2, 4), make(1, 3, 3), make(2, 2, 3)):
        assert (found["image"] != other["image"]).any()
        assert (found["target"] != other["target"]).any()
    cycled = [make(1, 2 + 5 * i, 3, views=5) for i in range(8)]  # the view that epoch 2 has
    assert all((found["target"] == other["target"]).all() for other in cycled)
    assert len({other["image"].tobytes() for other in cycled}) > 1


def test_a_target_is_the_geometry_without_the_colours():
    """RandAugment's moving operations reach the target, its colour operations don't."""
    changes = {"image_size": 60, "eval_resize": 60, "crop": "random", "flip": False}
    cfg = dataclasses.replace(CFG, augment="rand_augment", **changes)
    image = PHOTO[:, :60]
    example = transforms.TrainExample(cfg, 0, 100, True)
    targets = np.array([example((0, i, of(image)))["target"] for i in range(60)])
    geometric = (targets != image).any((1, 2, 3))
    filled = (targets == 128).all(-1).any((1, 2))  # grey from beyond the border
    # Two layers of 5 in 16: 47 % of the images stay in place.
    assert (geometric & filled).sum() > 10 and (~geometric).sum() > 10


def test_colour_augmentation_does_not_move_the_geometry():
    marked = np.zeros((60, 80, 3), np.uint8)
    marked[20:40, 30:60] = 100  # below solarisation's threshold
    jittered = dataclasses.replace(CFG, augment="three_augment", color_jitter=0.0)
    for seed in range(30):
        given = (0, 0, of(marked))
        plain = transforms.TrainExample(CFG, seed, 1)(given)["image"]
        found = transforms.TrainExample(jittered, seed, 1, True)(given)
        assert (found["target"] == plain).all()
        if (found["image"] != plain).any() and plain.std() > 0:  # blurred in place, not shifted
            assert abs(np.corrcoef(plain.ravel(), found["image"].ravel())[0, 1]) > 0.8


def test_random_erasing_puts_noise_into_one_rectangle_of_the_image_and_not_of_its_target():
    cfg = dataclasses.replace(CFG, crop="random", erasing=0.25)
    make = transforms.TrainExample(cfg, 0, 100, with_target=True)
    record, shares, values = of(np.full((40, 50, 3), 200, np.uint8)), [], []
    for example in range(400):
        found = make((7, example, record))
        assert (found["target"] == 200).all()
        changed_HxW = (found["image"] != 200).any(-1)
        if not changed_HxW.any():
            continue
        rows, columns = (np.flatnonzero(changed_HxW.any(axis)) for axis in (1, 0))
        box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        erased = found["image"][box]
        assert changed_HxW.sum() == changed_HxW[box].sum() > 0.95 * erased[..., 0].size
        shares.append(erased[..., 0].size / 32**2)
        values.append(erased.ravel())
    assert 70 < len(shares) < 130  # a quarter of 400, 3.5 standard deviations
    assert min(shares) > 0.01 and 0.25 < max(shares) < 0.36 and 0.12 < np.mean(shares) < 0.22
    noise = np.concatenate(values).astype(float)
    assert 124 < noise.mean() < 131 and 55 < noise.std() < 65
    assert (make((7, 3, record))["image"] == make((7, 3, record))["image"]).all()


@pytest.mark.parametrize(
    ("height", "width", "least"), [(375, 500, 0.05), (224, 224, 0.08), (40, 200, 0.05)]
)
def test_the_crop_of_tensorflow_has_the_distribution_of_its_own(height, width, least):
    """Kolmogorov-Smirnov of 2000 boxes of each: 0.07 is exceeded once in 10,000 times."""
    cfg = dataclasses.replace(CFG, crop="inception_tf", min_crop_area=least, flip=False)
    boxes = drawn(cfg, (height, width), None, 2000)

    def box(seed: tf.Tensor) -> tf.Tensor:
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            [height, width, 3], np.zeros((0, 0, 4), np.float32), (seed, 1), min_object_covered=0,
            aspect_ratio_range=(0.75, 1.33), area_range=(least, 1.0),
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        return tf.concat([begin[:2], size[:2]], 0)

    theirs = np.array(list(tf.data.Dataset.range(2000).map(box).as_numpy_iterator()))

    def features(boxes):
        top, left, height, width = boxes.T
        return [top, left, height, width, height * width, width / height]

    for a, b in zip(features(boxes), features(theirs), strict=True):
        assert ks_2samp(a, b).statistic < 0.07
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all() and (boxes >= 0).all()


def test_tensorflows_crop_may_be_the_whole_image():
    large = dataclasses.replace(CFG, crop="inception_tf", min_crop_area=0.9, flip=False)
    assert drawn(large, (40, 200), None, 1).tolist() == [[0, 0, 40, 200]]  # no aspect is so long


def test_eval_images_are_the_centre_of_the_resized_image():
    image = transforms.eval_image(PHOTO, DataConfig(channels=3, image_size=20, eval_resize=30))
    assert (image == transforms.resize(PHOTO, 30, 40)[5:25, 10:30]).all()


@pytest.mark.parametrize(
    ("wrong", "error", "named"),
    [
        ({"train_examples": 60}, ConfigError, r"train_examples is 60, .* 64 "),
        ({"num_classes": 10}, SetupError, r"num_classes is 10, .* 30 "),
        ({"eval_split": "holdout"}, SetupError, r"'holdout'.*train, validation, test"),
        ({"name": "no_such_data_set"}, SetupError, r"name is .no_such_data_set., .*data_dir"),
        ({"name": "fractals/huge"}, SetupError, "tiny, tiny_fresh"),
        ({"name": "cifar10"}, SetupError, r"supmim_jax\.data\.prepare --name cifar10 --data_dir"),
    ],
)
def test_the_data_set_must_be_what_the_config_says(cfg, wrong, error, named):
    Dataset.open(cfg)
    with pytest.raises(error, match=named):
        Dataset.open(changed(cfg, data=wrong))


def test_repeats_are_other_crops_of_an_image_in_a_row(cfg, one_device):
    batches = stream(changed(cfg, data={"crop": "inception", "repeats": 3}), one_device)
    assert len(batches) == cfg.total_steps  # an epoch is as long as ever
    ids = np.concatenate([batch.id for batch in batches])
    images = np.concatenate([batch.views[0] for batch in batches])
    for first in (0, 64, 128):
        epoch = ids[first : first + 63].reshape(21, 3)
        assert (epoch == epoch[:, :1]).all() and len(set(epoch[:, 0])) == 21
    seen = {(i, image.tobytes()) for i, image in zip(ids.tolist(), images)}
    assert len(seen) == len(ids)  # in no epoch the crop of another
