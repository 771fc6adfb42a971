"""The bench of the input pipeline: its numbers are of the work that it names."""

import json
from importlib.util import find_spec

import cv2
import numpy as np
import pytest
from conftest import python
from rivals import data, photographs, reference, tfdata_reference, tokens

from supmim_jax.data import decode, transforms
from supmim_jax.data import source as source_module
from supmim_jax.errors import SetupError

IMAGES = 16


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> str:
    where = str(tmp_path_factory.mktemp("photographs"))
    photographs.prepare(where, IMAGES, 0)
    return where


def small(**changes) -> data.Plan:
    return data.Plan(
        **{"images": IMAGES, "batch": 8, "rounds": 2, "batches": 2, "rival": False} | changes
    )


def test_area_average_and_bicubic_by_hand():
    row = np.array([[0.0, 30.0, 90.0]])[..., None]
    found = reference.resized(row, 1, 2)[0, :, 0]
    assert np.allclose(found, [10.0, 70.0])  # 1.5 pixels each: (0 + 15) / 1.5, (15 + 90) / 1.5
    # Twice as wide, places -0.25 and 0.25: taps at distances 1.25, 0.25, 0.75, 1.75 of a = -0.75.
    weights = reference.cubic_weights(4, 8)
    assert np.allclose(weights[3, :4], [-0.10546875, 0.87890625, 0.26171875, -0.03515625])
    assert np.allclose(weights.sum(1), 1) and np.allclose(weights[::-1, ::-1], weights)
    assert np.allclose(reference.area_weights(7, 3).sum(1), 1)


@pytest.mark.parametrize("how", ["area", "linear"])
@pytest.mark.parametrize("size", [(40, 50), (90, 120), (40, 120), (60, 80), (29, 60), (20, 30)])
def test_the_reference_is_what_the_crops_claim(size, how):
    image = photographs.draw(1, 2)[100:160, 100:180]
    found, expected = transforms.resize(image, *size, how), reference.resized(image, *size, how)
    assert reference.psnr(found, expected) > 50
    assert np.abs(found - np.clip(expected, 0, 255)).max() < 2


def test_psnr():
    image = np.full((4, 4, 3), 100, np.uint8)
    assert reference.psnr(image, image.astype(float)) == float("inf")
    assert np.isclose(reference.psnr(image, image + 5.0), 20 * np.log10(255 / 5))
    assert reference.psnr(np.full_like(image, 255), np.full(image.shape, 300.0)) == float("inf")


def test_photographs_are_like_imagenets_and_made_again_alike():
    files = [photographs.jpeg(0, i) for i in range(IMAGES)]
    assert files[3] == photographs.jpeg(0, 3)
    assert len({*files, photographs.jpeg(1, 3)}) == IMAGES + 1
    assert 90e3 < np.mean([len(file) for file in files]) < 130e3
    image = cv2.imdecode(np.frombuffer(files[0], np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (375, 500, 3)
    frame = files[0][files[0].index(b"\xff\xc0") :]
    assert frame[11] == 0x22 and frame[14] == frame[17] == 0x11  # sampling 2x2, 1x1, 1x1: 4:2:0
    grey = np.mean([photographs.draw(0, i).mean(-1) for i in range(8)], 0)
    spectrum = np.abs(np.fft.fft2(grey - grey.mean())) ** 2
    assert spectrum[1:8, 1:8].mean() > 100 * spectrum[100:108, 100:108].mean()


@pytest.mark.parametrize("augment", ["none", "three_augment"])
def test_fields_and_tables(directory, augment):
    """Augmented images are not compared with plain ones."""
    plan = small(augment=augment, rival=augment != "none")
    result = json.loads(json.dumps(data.measure(plan, directory)))
    assert result["images"] == IMAGES and result["kb"]["min"] < result["kb"]["mean"]
    assert set(result["one_core"]) == set(result["host"]) == {"supmim_jax"}
    for row in (result["one_core"]["supmim_jax"], result["host"]["supmim_jax"]):
        assert row["cpu_s_per_1000"] > 0 and row["images_per_s"] > 0 and row["ratio"] == 1
    assert list(result["stages_us"]) == list(data.STAGES)
    assert min(result["stages_us"].values()) > 0
    assert result["quality"]["images"] >= 64 and result["quality"]["min_db"] > 50
    assert "| decode JPEG |" in data.report(result)


def test_ours_over_theirs():
    ours = [{"cpu": c, "wall": 2 * c, "images": 100} for c in (0.1, 0.2)]
    theirs = [{"cpu": c, "wall": c, "images": 200} for c in (0.1, 0.8)]
    found = data.summed({data.OURS: ours, "theirs": theirs})
    assert np.isclose(found["theirs"]["cpu_s_per_1000"], 2.25)
    assert np.isclose(found[data.OURS]["images_per_s"], 1000 / 3)
    row = found["theirs"]  # half of ours in the first round, twice in the second
    assert np.allclose([row["ratio_min"], row["ratio"], row["ratio_max"]], [0.5, 1.25, 2.0])


def test_tfdata_makes_the_same_images(directory):
    if find_spec("tensorflow") is None:
        pytest.skip("needs TensorFlow")
    cfg = data.config(small(), directory, IMAGES)
    source = source_module.Source(cfg.data).records(cfg.data.train_split)
    boxes = data.boxes(cfg, IMAGES)
    example = transforms.TrainExample(cfg.data, cfg.seed, 1)
    ours = np.stack([example((0, i, source[i]))["image"] for i in range(8)])
    whole = [cv2.imdecode(np.frombuffer(source[i]["image"], np.uint8), 1) for i in range(8)]
    mine = [
        decode.Box(*b[:4]).of(w)[:, :: -1 if b[4] else 1] for b, w in zip(boxes.tolist(), whole)
    ]
    resized = np.stack([transforms.resize(x, 224, 224, "linear")[..., ::-1] for x in mine])
    assert (resized == ours).all()  # the boxes and the mirroring are those of the transform
    raw = [source.raw[i] for i in range(IMAGES)]
    with tfdata_reference.Rival(raw, boxes, 224, 8, cores=1) as rival:
        found = {name: rival.measure(name, 1) for name in tfdata_reference.VARIANTS}
        again = rival.measure("tf.data", 2)
    assert again["images"] == 16 and again["cpu"] > 0
    rounds = {name: [one] for name, one in found.items()}
    rounds[data.OURS] = [{"halves": tfdata_reference.halves(ours)}]
    data.check_same(rounds)
    for wrong in (ours[:, :, ::-1], ours[::-1]):
        rounds[data.OURS] = [{"halves": tfdata_reference.halves(wrong)}]
        with pytest.raises(RuntimeError, match=r"images of tf\.data differ from ours by"):
            data.check_same(rounds)


def test_a_rival_that_ends_says_why():
    with pytest.raises(RuntimeError, match=r"(?s)exited with 1: .*Error"):
        tfdata_reference.Rival([b"no"], np.zeros((1, 3)), 224, 1, cores="many")


def test_command(tmp_path):
    command = ["-m", "supmim_jax.bench", "data", "--images=4", "--batch=2"]
    command += ["--norival", "--rounds=1", "--batches=1"]
    out = python(*command, TMPDIR=str(tmp_path))
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout.splitlines()[-1])["plan"]["batch"] == 2
    assert not list(tmp_path.glob("*/photographs"))  # removed afterwards


def test_what_a_token_cache_costs():
    assert "ImageNet-1k x 3 views" in tokens.compare(records=50, epochs=3, images=2)


def test_what_is_kept_needs_a_place():
    for where, keep in (("", True), ("somewhere", False)):
        with pytest.raises(SetupError, match="--data_dir and --keep"):
            data.prepared(where, keep)
