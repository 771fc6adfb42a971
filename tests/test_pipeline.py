"""Records, transforms and global batches."""

import dataclasses
import pickle
import subprocess
import sys
import time

import cv2
import jax
import numpy as np
import pytest
import tensorflow as tf
from conftest import REPOSITORY
from hypothesis import given, settings
from hypothesis import strategies as st

from supmim_jax import sharding
from supmim_jax.config import DataConfig, MeshConfig
from supmim_jax.data import crops, decode, loader, sampler, transforms
from supmim_jax.data import source as source_module
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError, SetupError

NOISE = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)
PHOTO = cv2.resize(NOISE, (80, 60), interpolation=cv2.INTER_CUBIC) // 2 + 40  # low contrast


@given(st.integers(1, 3000), st.integers(0, 2**31 - 1), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_an_epoch_is_a_permutation(examples, seed, epoch):
    ids = [sampler.shuffled(place, examples, seed, epoch) for place in range(examples)]
    assert sorted(ids) == list(range(examples))


def test_epochs_and_seeds_are_shuffled_differently():
    orders = {
        tuple(sampler.shuffled(place, 50, seed, epoch) for place in range(50))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_together_read_each_position_once(processes):
    """Rows per process as a mesh over hosts gives them; positions of three steps."""
    share = 8 // processes
    positions = [
        sampler.LocalPosition(tuple(range(p * share, (p + 1) * share)), 8, 5)(i)
        for p in range(processes)
        for i in range(3 * share)
    ]
    assert sorted(positions) == list(range(40, 64))


def stream(cfg, mesh, first=0) -> list:
    return [jax.tree.map(np.asarray, b) for b in Dataset.open(cfg).train(mesh, first)]


def test_batches_are_the_same_on_any_mesh_and_after_a_restart(cfg, one_device):
    whole = stream(cfg, one_device)
    assert len(whole) == cfg.total_steps == 12
    for epoch in range(3):
        ids = np.concatenate([b.id for b in whole[4 * epoch : 4 * epoch + 4]])
        assert sorted(ids) == list(range(64))
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    for other, first in ((stream(cfg, mesh), 0), (stream(cfg, one_device, 5), 5)):
        for a, b in zip(whole[first:], other, strict=True):
            assert all(np.array_equal(x, y) for x, y in zip(*map(jax.tree.leaves, (a, b))))


def test_no_more_batches_are_decoded_ahead_than_the_config_says(cfg, one_device, monkeypatch):
    decoded = []
    decoding = transforms.decode_image
    monkeypatch.setattr(transforms, "decode_image", lambda *a: (decoded.append(1), decoding(*a))[1])
    cfg = dataclasses.replace(cfg, epochs=20)
    next(Dataset.open(cfg).train(one_device))
    time.sleep(1.0)
    threads = cfg.data.threads
    most = 2 + loader.ON_DEVICES + cfg.data.prefetch + threads  # one taken, one being placed
    assert cfg.batch_size <= len(decoded) <= most * cfg.batch_size


def test_workers_give_the_batches_that_threads_give(cfg, one_device):
    cfg = dataclasses.replace(cfg, epochs=1)
    in_threads = stream(cfg, one_device)
    data = dataclasses.replace(cfg.data, workers=2)
    in_processes = stream(dataclasses.replace(cfg, data=data), one_device)
    for a, b in zip(in_threads, in_processes, strict=True):
        assert (a.id == b.id).all() and (a.views[0] == b.views[0]).all()


def test_worker_code_imports_neither_tensorflow_nor_clu():
    code = (
        "import sys, supmim_jax.data.source, supmim_jax.data.transforms\n"
        "print([m for m in ('tensorflow', 'clu') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "[]"


def test_evaluation_counts_every_example_once(cfg, one_device):
    cfg = dataclasses.replace(cfg, eval=dataclasses.replace(cfg.eval, batch_size=48))
    batches = list(Dataset(cfg).eval("validation[:100]", one_device))
    ids = np.concatenate([b.id for b in batches])
    weight = np.concatenate([b.weight for b in batches])
    assert len(ids) == 144 and (ids[:100] == range(100)).all() and (ids[100:] == -1).all()
    assert weight.sum() == 100 and (weight[:100] == 1).all()


def test_an_examples_image_depends_on_seed_epoch_and_id_alone():
    cfg = DataConfig(
        channels=3, image_size=32, eval_resize=32, crop="inception", augment="rand_augment"
    )

    record = {"image": cv2.imencode(".png", PHOTO)[1].tobytes(), "label": 5}

    def make(seed, epoch, example, views=100):
        return transforms.TrainExample(cfg, seed, views, True)((epoch, example, record))

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
    cfg = DataConfig(
        channels=3, image_size=60, eval_resize=60, crop="random", flip=False, augment="rand_augment"
    )
    image = PHOTO[:, :60]
    record = {"image": cv2.imencode(".png", image[..., ::-1])[1].tobytes(), "label": 0}
    example = transforms.TrainExample(cfg, 0, 100, True)
    moved = same = 0
    for i in range(60):
        found = example((0, i, record))
        target = found["target"].astype(int)
        geometric = (target != image).any()
        moved += geometric and (target == 128).all(-1).any()  # grey from beyond the border
        same += not geometric
    assert moved > 10 and same > 10  # two layers of 5 in 16: 47 % of the images stay in place


def test_colour_augmentation_does_not_move_the_geometry():
    cfg = DataConfig(channels=3, image_size=32, eval_resize=32, crop="inception")
    marked = np.zeros((60, 80, 3), np.uint8)
    marked[20:40, 30:60] = 100  # below solarisation's threshold
    jittered = dataclasses.replace(cfg, augment="three_augment", color_jitter=0.0)
    for seed in range(30):
        record = {"image": cv2.imencode(".png", marked)[1].tobytes(), "label": 0}
        plain = transforms.TrainExample(cfg, seed, 1)((0, 0, record))["image"]
        found = transforms.TrainExample(jittered, seed, 1, True)((0, 0, record))
        coloured = found["image"]
        assert (found["target"] == plain).all()
        if (coloured == plain).all() or plain.std() == 0:
            continue
        difference = np.corrcoef(plain.ravel(), coloured.ravel())[0, 1]
        assert abs(difference) > 0.8  # blurred in place, not shifted


def test_random_erasing_puts_noise_into_one_rectangle_of_the_image_and_not_of_its_target():
    encoded = cv2.imencode(".png", np.full((40, 50, 3), 200, np.uint8))[1].tobytes()
    cfg = DataConfig(channels=3, image_size=32, eval_resize=32, erasing=0.25)
    shares, values = [], []
    for example in range(400):
        make = transforms.TrainExample(cfg, 0, 100, with_target=True)
        found = make((7, example, {"image": encoded, "label": 0}))
        assert (found["target"] == 200).all()
        changed = (found["image"] != 200).any(-1)
        if not changed.any():
            continue
        rows, columns = (np.flatnonzero(changed.any(axis)) for axis in (1, 0))
        box = found["image"][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        outside = (
            changed.sum() - changed[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].sum()
        )
        assert outside == 0 and changed.sum() > 0.95 * box[..., 0].size
        shares.append(box[..., 0].size / 32**2)
        values.append(box.ravel())
    assert 70 < len(shares) < 130  # a quarter of 400, 3.5 standard deviations
    assert min(shares) > 0.01 and 0.25 < max(shares) < 0.36 and 0.12 < np.mean(shares) < 0.22
    noise = np.concatenate(values).astype(float)
    assert 124 < noise.mean() < 131 and 55 < noise.std() < 65
    again = transforms.TrainExample(cfg, 0, 100)((7, 3, {"image": encoded, "label": 0}))["image"]
    same = transforms.TrainExample(cfg, 0, 100)((7, 3, {"image": encoded, "label": 0}))["image"]
    assert (again == same).all()


def test_the_inception_crop_keeps_to_its_area_and_covers_the_image():
    cfg = DataConfig(channels=3, image_size=8, eval_resize=8, crop="inception", min_crop_area=0.5)
    boxes = []
    for i in range(300):
        rng = transforms.generator(0, 0, i, transforms.GEOMETRY)
        boxes.append(crops.inception_crop(60, 80, cfg, rng))
    top, left, height, width = np.array(boxes).T
    share, aspect = height * width / 4800, width / height
    assert 0.49 < share.min() < 0.55 and share.max() > 0.9 and 0.6 < share.mean() < 0.8
    assert 0.72 < aspect.min() < 0.85 and 1.2 < aspect.max() < 1.36
    assert (top.min(), left.min()) == (0, 0)
    assert ((top + height).max(), (left + width).max()) == (60, 80)


@pytest.mark.parametrize(
    ("height", "width", "least"), [(375, 500, 0.05), (224, 224, 0.08), (40, 200, 0.05)]
)
def test_the_crop_of_tensorflow_has_the_distribution_of_its_own(height, width, least):
    """Kolmogorov-Smirnov of 2000 boxes of each: 0.07 is exceeded once in 10,000 times."""
    cfg = DataConfig(channels=3, image_size=8, eval_resize=8, crop="inception_tf")
    cfg = dataclasses.replace(cfg, min_crop_area=least, flip=False)
    boxes, theirs = np.zeros((2000, 4), int), np.zeros((2000, 4), int)
    for i in range(2000):
        rng = transforms.generator(0, 0, i, transforms.GEOMETRY)
        crop = crops.draw_crop(height, width, cfg, rng)
        assert crop.extent == (height, width)
        boxes[i] = crop.box
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            [height, width, 3], np.zeros((0, 0, 4), np.float32), (i, 1), min_object_covered=0,
            aspect_ratio_range=(0.75, 1.33), area_range=(least, 1.0),
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        theirs[i] = *begin[:2], *size[:2]
    for a, b in zip(features(boxes), features(theirs), strict=True):
        at = np.union1d(a, b)
        shares = [np.searchsorted(np.sort(x), at, "right") / 2000 for x in (a, b)]
        assert abs(shares[0] - shares[1]).max() < 0.07
    assert (boxes[:, :2] + boxes[:, 2:] <= (height, width)).all() and (boxes >= 0).all()


def features(boxes: np.ndarray) -> list[np.ndarray]:
    top, left, height, width = boxes.T
    return [top, left, height, width, height * width, width / height]


def test_tensorflows_crop_favours_small_areas_and_may_be_the_whole_image():
    cfg = DataConfig(channels=3, image_size=8, eval_resize=8, min_crop_area=0.05, flip=False)

    def mean_area(crop):
        drawn = dataclasses.replace(cfg, crop=crop)
        rng = np.random.default_rng(0)
        found = [crops.draw_crop(375, 500, drawn, rng).box for _ in range(2000)]
        return np.mean([box.height * box.width for box in found]) / (375 * 500)

    # Deviations are 0.26; four standard errors of 2000 are 0.024.
    assert abs(mean_area("inception_tf") - 0.35) < 0.024
    assert mean_area("inception") > 0.4
    large = dataclasses.replace(cfg, crop="inception_tf", min_crop_area=0.9)
    rng = np.random.default_rng(0)
    assert crops.draw_crop(40, 200, large, rng).box == (
        0,
        0,
        40,
        200,
    )  # no allowed aspect is so long


def test_eval_images_are_the_centre_of_the_resized_image():
    cfg = DataConfig(channels=3, image_size=20, eval_resize=30)
    image = crops.eval_image(PHOTO, cfg)
    assert (image == crops.resize(PHOTO, 30, 40)[5:25, 10:30]).all()


def test_undecodable_bytes_are_named():
    for encoded in (b"", b"not an image"):
        with pytest.raises(decode.BrokenRecord, match=r"set record 7: 'image', \d+ bytes"):
            decode.decode_image({"image": encoded}, DataConfig(name="set"), 7)


def test_the_data_set_must_be_what_the_config_says(cfg, one_device):
    def opened(**changes):
        data = dataclasses.replace(cfg.data, **changes)
        return Dataset.open(dataclasses.replace(cfg, data=data))

    opened()
    with pytest.raises(ConfigError, match=r"train_examples is 60, but .* has 64 examples"):
        opened(train_examples=60)
    with pytest.raises(SetupError, match=r"num_classes is 10, but the data set .* has 30 classes"):
        opened(num_classes=10)
    with pytest.raises(SetupError, match=r"no split 'holdout'.*train, validation, test"):
        opened(eval_split="holdout")
    with pytest.raises(SetupError, match=r"name is .no_such_data_set., .*data_dir"):
        opened(name="no_such_data_set")
    with pytest.raises(SetupError, match="known are tiny, tiny_fresh"):
        opened(name="fractals/huge")
    with pytest.raises(SetupError, match=r"supmim_jax\.data\.prepare --name cifar10 --data_dir"):
        opened(name="cifar10")


def test_sources_travel_to_worker_processes(cfg):
    source = source_module.open_source(cfg.data, "train[:8]")
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == 8 and again[3]["image"] == source[3]["image"]


def test_repeats_are_other_crops_of_an_image_in_a_row(cfg, one_device):
    data = dataclasses.replace(cfg.data, crop="inception", repeats=3)
    batches = list(Dataset.open(dataclasses.replace(cfg, data=data)).train(one_device))
    assert len(batches) == cfg.total_steps  # an epoch is as long as ever
    ids = np.concatenate([np.asarray(batch.id) for batch in batches])
    images = np.concatenate([np.asarray(batch.views[0]) for batch in batches])
    for first in (0, 64, 128):
        epoch = ids[first : first + 63].reshape(21, 3)
        assert (epoch == epoch[:, :1]).all() and len(set(epoch[:, 0])) == 21
    first, second, third = images[:3]
    assert (first != second).any() and (second != third).any() and (first != third).any()
    seen = {(i, image.tobytes()) for i, image in zip(ids.tolist(), images)}
    assert len(seen) == len(ids)  # in no epoch the crop of another
