"""Heat maps, their boxes, the pass that finds them in training, and what is saved of it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE, make_params, metric_lines
from rivals import boxes as bench

from supmim_jax import contrastive_boxes, sharding
from supmim_jax import encoder as encoder_module
from supmim_jax.batch import Features
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    CMAEConfig,
    ContrastiveCropConfig,
    DecoderConfig,
    EvalConfig,
    MeshConfig,
    SegmentationObjectiveConfig,
    VQGANObjectiveConfig,
    changed,
)
from supmim_jax.data import sampler
from supmim_jax.data.loader import Dataset
from supmim_jax.data.transforms import WHOLE
from supmim_jax.errors import ConfigError, SetupError
from supmim_jax.train import train


@pytest.fixture
def cropping(cfg):
    """CMAE for 12 steps whose boxes are found after steps 3, 6 and 9."""
    boxes = ContrastiveCropConfig(every_epochs=0.75, threshold=0.4)
    return changed(
        cfg,
        data={"crop": "contrastive", "contrastive_crop": boxes},
        objective=CMAEConfig(decoder=DecoderConfig(depth=1, width=16, mlp_dim=32, heads=2)),
        eval=EvalConfig(which=("knn",), batch_size=48),
        log={"every": 1},
    )


def test_an_empty_image_has_the_median_colour():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), np.uint8)
    found = np.asarray(contrastive_boxes.emptied(images))
    assert found.dtype == np.uint8 and found.shape == images.shape
    for image, empty in zip(images, found):
        colour = np.median(image.reshape(-1, 3), axis=0)
        assert (empty == colour).all()


def test_what_differs_from_an_empty_image_is_warm_wherever_it_is():
    random = np.random.default_rng(0)
    places = 10 * random.normal(size=(8, 8, 32))  # what tokens say of their places alone
    shown = np.zeros((8, 8), bool)
    shown[0:3, 3:8] = True  # at the border, too
    tokens = places + np.where(shown[..., None], random.normal(size=32), 0.0)
    tokens += 0.01 * random.normal(size=tokens.shape)
    (heat,) = np.asarray(contrastive_boxes.heat_map(tokens[None], places[None]))
    assert heat.shape == (8, 8) and heat[shown].min() > 10 * heat[~shown].max()
    by_hand = np.sqrt(((tokens - places) ** 2).sum(-1))
    np.testing.assert_allclose(heat, by_hand, rtol=1e-4)


def test_boxes_by_hand():
    heat = np.full((1, 8, 8), -3.0, np.float32)
    heat[0, 2:5, 3:7] = 1.0
    (found,) = np.asarray(contrastive_boxes.bounds(heat, 8, 0.5))
    np.testing.assert_array_equal(found, [2 * 255 // 8, 3 * 255 // 8, 160, 224])  # ceil(5/8, 7/8)
    heat[0, 7, 0] = -1.1  # 0.475 of the way up
    assert (np.asarray(contrastive_boxes.bounds(heat, 8, 0.5))[0] == found).all()
    (wider,) = np.asarray(contrastive_boxes.bounds(heat, 8, 0.45))
    np.testing.assert_array_equal(wider, [63, 0, 255, 224])
    flat = jnp.full((1, 8, 8), 2.0)
    np.testing.assert_array_equal(contrastive_boxes.bounds(flat, 8, 0.5)[0], WHOLE)
    larger = np.asarray(contrastive_boxes.bounds(jnp.asarray(heat[:, :7]), 70, 0.8))[0]
    assert larger[1] > found[1] and larger[3] < found[3]  # it is enlarged, then cut


def test_a_pass_finds_the_box_of_every_image_on_any_mesh(cropping, one_device):
    found = []
    params = make_params(cropping)
    for mesh in (one_device, sharding.make_mesh(MeshConfig(data=4, fsdp=2))):
        subject = encoder_module.build_encoder(cropping, 48, mesh)  # 64 images: a batch is padded
        found.append(contrastive_boxes.boxes(subject.bind(params), Dataset(cropping), mesh))
    table, other = found
    assert table.dtype == np.uint8 and table.shape == (64, 4)
    assert (np.abs(table.astype(int) - other) > 0).mean() < 0.05  # rounding moves few edges
    assert len(np.unique(table, axis=0)) > 16
    assert (table[:, 0] < table[:, 2]).all() and (table[:, 1] < table[:, 3]).all()

    encoder = encoder_module.build_encoder(cropping, 48, one_device).bind(params)
    images = next(Dataset(cropping).whole("train[:64]", one_device)).views[0]
    empty = encoder.features(contrastive_boxes.emptied(images)).tokens
    heat = contrastive_boxes.heat_map(encoder.features(images).tokens, empty)
    np.testing.assert_array_equal(contrastive_boxes.bounds(heat, 20, 0.4), table[:48])


def test_a_record_that_cannot_be_read_has_the_whole_image(cropping, one_device, monkeypatch):
    reading = sampler.EvaluationRecord.__call__
    broken = lambda self, i: (i, None) if i == 5 else reading(self, i)  # noqa: E731
    monkeypatch.setattr(sampler.EvaluationRecord, "__call__", broken)
    encoder = encoder_module.build_encoder(cropping, 48, one_device).bind(make_params(cropping))
    table = contrastive_boxes.boxes(encoder, Dataset(cropping), one_device)
    np.testing.assert_array_equal(table[5], WHOLE)
    assert (table != np.array(WHOLE)).any(1).sum() > 32


def test_what_takes_long_comes_after_a_checkpoint(cropping):
    cfg = changed(cropping, checkpoint={"every": 100}, eval={"every": 5})
    assert [s for s in range(13) if cfg.saves_after(s)] == [0, 3, 5, 6, 9, 10]


@pytest.mark.usefixtures("build_once")
def test_a_run_that_crops_by_boxes_resumes_bit_for_bit(cropping, tmp_path, monkeypatch):
    passes = []
    finding = contrastive_boxes.boxes
    monkeypatch.setattr(contrastive_boxes, "boxes", lambda *a: passes.append(1) or finding(*a))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cropping, whole, devices=ONE)
    assert len(passes) == 3  # not after the last step
    for stop_at in (3, 7, None):  # at the first pass, between two
        train(cropping, parts, stop_at=stop_at, devices=ONE)
    assert len(passes) == 6

    losses = [[x["loss"] for x in metric_lines(d) if "loss" in x] for d in (whole, parts)]
    assert losses[0] == losses[1] and len(losses[0]) == 12
    saved = [Checkpoint.open(str(workdir)).restore_boxes() for workdir in (whole, parts)]
    np.testing.assert_array_equal(*saved)
    assert saved[0].shape == (64, 4) and (saved[0] != np.array(WHOLE)).any()


@pytest.mark.usefixtures("build_once")
def test_boxes_of_another_number_of_images_or_none_are_refused(cropping, tmp_path):
    train(cropping, tmp_path, stop_at=4, devices=ONE)
    saved = Checkpoint.open(str(tmp_path))
    other = changed(cropping, data={"train_examples": 63, "train_split": "train[:63]"})
    with pytest.raises(SetupError, match=r"boxes is uint8\[64, 4\] in the checkpoint"):
        dataclasses.replace(saved, config=other).restore_boxes()
    early = saved.directory.parent / "2"
    assert dataclasses.replace(saved, directory=early).restore_boxes() is None  # no pass by then
    for path in (tmp_path / "checkpoints" / "4" / "boxes").iterdir():
        if path.is_file():
            path.unlink()
    with pytest.raises(SetupError, match=r"is damaged: boxes/\S+ is missing; "):
        Checkpoint.open(str(tmp_path))


def test_heat_maps_need_an_encoder_and_no_token_cache(cfg):
    cfg = changed(cfg, data={"crop": "contrastive"})
    with pytest.raises(ConfigError, match=r"boxes is 'heat_map'.*tokens\.cache.*'centre'"):
        changed(cfg, tokens={"cache": "there"})
    assert cfg.steps_per_boxes == 80  # 20 epochs of 4 steps
    small = {"image_size": 16, "eval_resize": 16, "masks": {"field": "segmentation"}}
    for other in (SegmentationObjectiveConfig(), VQGANObjectiveConfig()):
        with pytest.raises(ConfigError, match=f"'heat_map'.* not '{other.name}': take 'centre'"):
            changed(cfg, data=small, objective=other)
    centre = {"contrastive_crop": {"boxes": "centre"}}
    assert changed(cfg, data=centre, tokens={"cache": "there"}).steps_per_boxes == 0


class Patches:
    """An encoder that sees the mean and the deviation of each 4x4 patch."""

    def features(self, images) -> Features:
        x = jnp.asarray(images, jnp.float32).reshape(len(images), 5, 4, 5, 4, 1)
        tokens = jnp.stack([x.mean((2, 4, 5)), x.std((2, 4, 5))], -1)
        return Features(tokens.mean((1, 2)), tokens)


def test_boxes_find_the_figures_of_fractals(cropping):
    """What a box should hold is known from the masks; the whole image is no bad guess."""
    cfg = changed(cropping, data={"masks": {"field": "segmentation", "num_classes": 31}})
    found = bench.measure(Patches(), cfg, "train[:120]", 120)
    assert found["heat map > 0.4"][0] > found["whole image"][0] + 0.02
    assert found["whole image"][1] == 1.0 and found["heat map > 0.4"][1] < 0.9
    assert "| whole image |" in bench.report(found)
    with pytest.raises(SetupError, match=r"masks\.field of the checkpoint is empty"):
        bench.measure(Patches(), cropping, "train", 1)


def test_overlaps_by_hand():
    a = np.array([[0, 0, 0.5, 1], [0, 0, 1, 1], [0, 0, 0.2, 0.2]])
    b = np.array([[0.25, 0, 1, 1], [0, 0, 1, 1], [0.5, 0.5, 1, 1]])
    np.testing.assert_allclose(bench.iou(a, b), [0.25, 1.0, 0.0])
    shown = np.zeros((4, 8), bool)
    shown[1:3, 2:6] = True
    np.testing.assert_allclose(bench.around(shown), [0.25, 0.25, 0.75, 0.75])
