"""Two crops of an image, boxes that crops follow, and passes over whole images."""

import dataclasses
import threading
import time

import cv2
import jax
import numpy as np
import pytest
from conftest import same
from test_jpeg import encoded, needs_library, photograph

from supmim_jax import sharding, train_step
from supmim_jax.config import CMAEConfig, DataConfig, MeshConfig, changed
from supmim_jax.data import decode, loader, transforms
from supmim_jax.data import source as source_module
from supmim_jax.data.loader import Dataset
from supmim_jax.data.transforms import TrainExample

PHOTO = cv2.imencode(".png", photograph(60, 80))[1].tobytes()
CFG = DataConfig(
    channels=3, image_size=32, eval_resize=32, crop="inception", augment="rand_augment"
)


def table(examples: int = 64, seed: int = 0) -> np.ndarray:
    """Boxes at random."""
    edges = np.random.default_rng(seed).integers(0, 256, (examples, 2, 2), np.uint8)
    return np.sort(edges, axis=1).reshape(examples, 4)


@pytest.fixture
def pairs(cfg):
    """A run that sees two contrastive crops of each image."""
    return changed(cfg, data={"crop": "contrastive"}, objective=CMAEConfig())


def taken(batches, count: int | None = None) -> list:
    """Batches on the host; `count` of them, or all."""
    on_host = []
    while len(on_host) != count and (batch := next(batches, None)) is not None:
        on_host.append(jax.tree.map(np.asarray, batch))
    return on_host


@pytest.mark.parametrize("augment", ["none", "rand_augment", "timm_rand_augment", "three_augment"])
@pytest.mark.parametrize("crop", ["inception", "inception_tf", "contrastive"])
def test_the_second_view_is_another_and_the_first_is_what_it_is_alone(crop, augment):
    changes = {"crop": crop, "augment": augment, "augment_magnitude": 1.0}
    cfg = dataclasses.replace(CFG, erasing=0.2, **changes)
    boxes = table() if crop == "contrastive" else None
    record, second = {"image": PHOTO, "label": 1}, []
    make_one, make = (TrainExample(cfg, 1, 9, crops=n, boxes=boxes) for n in (1, 2))
    for example in range(20):
        alone, both = make_one((4, example, record)), make((4, example, record))
        assert set(both) == {*alone, "second_image"}
        assert all(np.array_equal(both[name], alone[name]) for name in alone)
        assert (both["image"] != both["second_image"]).any()
        for epoch, alike in ((4, True), (5, False)):
            again = make((epoch, example, record))["second_image"]
            assert np.array_equal(again, both["second_image"]) == alike
        second.append(both["second_image"].tobytes())
    assert len(set(second)) == 20


def test_the_second_view_has_colours_of_its_own():
    """Of a plain square, which no crop tells from another."""
    plain = cv2.imencode(".png", np.full((64, 64, 3), (40, 90, 160), np.uint8))[1].tobytes()
    cfg = dataclasses.replace(CFG, augment="color_jitter", color_jitter=0.5)
    make, differ = TrainExample(cfg, 1, 9, with_target=True, crops=2), 0
    for example in range(20):
        both, later = (make((epoch, example, {"image": plain, "label": 1})) for epoch in (4, 13))
        assert np.array_equal(both["target"], later["target"])
        differ += (both["image"] != both["second_image"]).any()
        differ += (both["second_image"] != later["second_image"]).any()
    assert differ > 35


def test_geometry_and_colours_of_both_views_are_streams_of_their_own():
    first = {
        transforms.generator(1, number, example, stream, crop).random()
        for number in range(3)
        for example in range(3)
        for stream in (transforms.GEOMETRY, transforms.COLOURS)
        for crop in (0, 1)
    }
    assert len(first) == 36
    assert transforms.generator(1, 2, 3, 0).random() == transforms.generator(1, 2, 3, 0, 0).random()


@needs_library
def test_of_two_views_a_jpeg_is_decoded_once_and_the_first_is_that_of_its_part(monkeypatch):
    cfg = dataclasses.replace(CFG, crop="contrastive", resize="linear")
    whole, parts = [], []
    decoding, region = transforms.decode_image, decode.jpeg_region
    monkeypatch.setattr(transforms, "decode_image", lambda *a: (whole.append(1), decoding(*a))[1])
    monkeypatch.setattr(transforms, "jpeg_region", lambda *a: (parts.append(1), region(*a))[1])
    for i in range(12):
        file = encoded(photograph(60 + i, 90 - i, i), subsampling="4:2:0")
        one, two = (
            TrainExample(cfg, 5, 10, crops=n, boxes=table())((i, i, {"image": file, "label": 0}))
            for n in (1, 2)
        )
        assert np.array_equal(one["image"], two["image"])
    assert len(whole) == len(parts) == 12


def test_boxes_move_the_crops(pairs):
    """Each quarter of the image has a brightness of its own."""
    quarters = np.kron(np.array([[0, 80], [160, 240]], np.uint8), np.ones((40, 40), np.uint8))
    record = {"image": cv2.imencode(".png", quarters)[1].tobytes(), "label": 0}
    data = dataclasses.replace(pairs.data, flip=False, min_crop_area=0.05)
    edges = (10, 10, 20, 20), (10, 235, 20, 245), (235, 10, 245, 20), (235, 235, 245, 245)
    make = TrainExample(data, 0, 1000, crops=2, boxes=np.array(edges, np.uint8))
    for example, brightness in enumerate((0, 80, 160, 240)):
        corner = (0 if example < 2 else -1), (0 if example % 2 == 0 else -1)
        for epoch in range(30):
            fields = make((epoch, example, record))
            for name in ("image", "second_image"):
                assert abs(int(fields[name][*corner, 0]) - brightness) < 20
    plain = TrainExample(data, 0, 1000, crops=2)
    corners = [plain((epoch, 0, record))["image"][0, 0, 0] for epoch in range(30)]
    assert max(corners) > 100


def test_batches_have_two_views_on_any_mesh_and_any_number_of_hosts(pairs, one_device):
    boxes, dataset = table(), Dataset.open(pairs)
    whole = taken(dataset.train(one_device, boxes=boxes))
    assert len(whole) == pairs.total_steps and [len(b.views) for b in whole] == [2] * 12
    abstract = train_step.abstract_batch(pairs, 16, one_device)
    of_step = jax.tree.map(lambda x: (x.shape, x.dtype), whole[0])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == of_step
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert same(whole, taken(dataset.train(mesh, boxes=boxes)))
    assert same(whole[5:], taken(dataset.train(one_device, 5, boxes=boxes)))
    for a, b in zip(whole, taken(dataset.train(one_device))):
        assert (a.id == b.id).all() and (a.views[0] != b.views[0]).any()
    hosts = [dataset.train_on_host(rows, boxes=boxes) for rows in (range(8), range(8, 16))]
    for batch, *parts in zip(whole, *hosts, strict=True):
        for view, name in zip(batch.views, ("image", "second_image")):
            assert np.array_equal(np.concatenate([part[name] for part in parts]), view)


def test_workers_give_the_views_that_threads_give(pairs, one_device):
    pairs = dataclasses.replace(pairs, epochs=1)
    batches = Dataset.open(changed(pairs, data={"workers": 2})).train(one_device, boxes=table())
    workers = taken(batches, 2)
    batches.restart(2, table(seed=1))
    rest = taken(batches)
    batches.close()
    threads = Dataset.open(pairs)
    assert same(taken(threads.train(one_device, boxes=table()), 2), workers)
    assert same(taken(threads.train(one_device, 2, boxes=table(seed=1))), rest)


def running() -> set:
    return {thread for thread in threading.enumerate() if thread.name.startswith("prefetch")}


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_after_a_restart_batches_are_those_of_a_run_that_begins_there(
    pairs, one_device, steps, monkeypatch
):
    before, other, dataset = running(), table(seed=1), Dataset.open(pairs)
    batches = dataset.train(one_device, boxes=table())
    first = taken(batches, steps)
    time.sleep(0.3)  # batches of the old boxes wait
    closed, host = [], batches.host
    monkeypatch.setattr(host, "close", lambda: closed.append(loader.HostBatches.close(host)))
    batches.restart(steps, other)
    assert len(closed) == 1 and len(running() - before) == 1
    rest = taken(batches)
    batches.close()
    assert running() <= before and len(first) + len(rest) == pairs.total_steps
    assert same(rest, taken(dataset.train(one_device, steps, boxes=other)))
    for a, b in zip(rest, taken(dataset.train(one_device, steps, boxes=table()))):
        assert (a.id == b.id).all() and (a.views[0] != b.views[0]).any()
    batches.restart(pairs.total_steps - 1, None)
    assert same(taken(batches), taken(dataset.train(one_device, pairs.total_steps - 1)))
    batches.restart(pairs.total_steps, other)
    assert taken(batches) == []


def test_whole_images_are_those_of_the_split_in_order(cfg, one_device):
    cfg = changed(cfg, eval={"batch_size": 48})
    whole = taken(Dataset(cfg).whole(cfg.data.train_split, one_device))
    ids, weight = (np.concatenate([getattr(b, x) for b in whole]) for x in ("id", "weight"))
    assert ids.tolist() == [*range(64), *[-1] * 32]
    assert weight.sum() == 64 and (weight[:64] == 1).all()
    assert whole[0].views[0].shape == (48, 20, 20, 1) and len(whole[0].views) == 1
    source = source_module.Source(cfg.data).records(cfg.data.train_split)
    for i in (0, 63):
        image = transforms.whole_image(decode.decode_image(source[i], cfg.data, i), cfg.data)
        assert (whole[i // 48].views[0][i % 48] == image).all()
    mesh = sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    assert same(whole, taken(Dataset(cfg).whole(cfg.data.train_split, mesh)))


def test_a_whole_image_has_all_four_corners_whatever_its_shape():
    image = np.full((30, 200, 3), 100, np.uint8)
    image[:15, :100], image[15:, 100:] = 0, 250
    record = {"image": cv2.imencode(".png", image)[1].tobytes(), "label": 0}
    square = transforms.EvalExample(CFG, transforms.whole_image)((0, record))["image"]
    corners = square[:13, :13], square[:13, 19:], square[19:, :13], square[19:, 19:]
    for corner, brightness in zip(corners, (0, 100, 100, 250), strict=True):
        assert (abs(corner.astype(int) - brightness) < 6).all()
