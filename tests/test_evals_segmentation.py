"""Segmentation heads on toy tokens, and their scores against another way of counting."""

import jax
import numpy as np
import pytest

from supmim_jax import sharding
from supmim_jax.config import HeadTrainingConfig, MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import segmentation

CLASSES, GRID, PATCH = 4, 4, 5


def toy(count: int, seed: int):
    """Tokens whose class is that of their patch, and masks of whole patches; some are ignored."""
    centres = np.random.default_rng(0).normal(size=(CLASSES, 8))
    random = np.random.default_rng([seed, 1])
    grid = random.integers(0, CLASSES, (count, GRID, GRID))
    tokens = centres[grid] + 0.1 * random.normal(size=(count, GRID, GRID, 8))
    masks = grid.repeat(PATCH, axis=1).repeat(PATCH, axis=2)
    masks[random.random(masks.shape) < 0.1] = -1
    return tokens.astype(np.float32), masks


def fit(tokens, masks, mesh, head: str = "linear", **changed) -> segmentation.Segmenter:
    training = HeadTrainingConfig(**({"steps": 60, "learning_rate": 0.03} | changed))
    options = {"classes": CLASSES, "head": head, "training": training}
    return segmentation.fit(tokens, masks, mesh=mesh, **options)


def scored(segmenter: segmentation.Segmenter, tokens, masks, batch_size: int = 32):
    predicted = segmentation.predict(segmenter, tokens, masks.shape[1:], batch_size)
    return segmentation.score(segmentation.count(masks, predicted, CLASSES))


def test_scores_are_those_of_counting_sets_of_pixels():
    random = np.random.default_rng(0)
    truth, predicted = random.integers(0, 5, (6, 9, 9)), random.integers(0, 5, (6, 9, 9))
    truth[truth == 3], predicted[predicted == 3] = 2, 2  # class 3 is nowhere
    truth[truth == 4] = 1  # class 4 is only predicted: its IoU is 0, and counts
    truth[random.random(truth.shape) < 0.2] = -1
    matrix = sum(segmentation.count(t, p, 5) for t, p in zip(truth, predicted))
    scores = segmentation.score(matrix)

    labelled = {i for i, t in enumerate(truth.ravel()) if t != -1}
    overlaps = []
    for name in (0, 1, 2, 4):
        is_true = {i for i in labelled if truth.ravel()[i] == name}
        is_found = {i for i in labelled if predicted.ravel()[i] == name}
        overlaps.append(100 * len(is_true & is_found) / len(is_true | is_found))
    assert scores.iou == pytest.approx([*overlaps[:3], None, 0])
    assert scores.miou == pytest.approx(sum(overlaps) / 4)
    equal = [truth.ravel()[i] == predicted.ravel()[i] for i in labelled]
    assert scores.pixel_accuracy == pytest.approx(100 * np.mean(equal))
    with pytest.raises(SetupError):  # no pixel counts
        segmentation.score(np.zeros((5, 5), int))


def test_a_head_classifies_whole_grids_as_their_tokens(one_device):
    """Masks as small as the grid: no upsampling, so a separable problem is solved completely."""
    (tokens, masks), (test, truth) = toy(40, seed=0), toy(50, seed=1)
    segmenter = fit(tokens, masks[:, 2::PATCH, 2::PATCH], one_device, steps=100)
    scores = scored(segmenter, test, truth[:, 2::PATCH, 2::PATCH])
    assert scores.miou == scores.pixel_accuracy == 100.0


@pytest.mark.parametrize(("head", "learned"), [("linear", 60), ("conv", 70)])
def test_segments_are_learned_and_shuffled_masks_are_not(head, learned, one_device):
    (tokens, masks), test = toy(96, seed=0), toy(60, seed=1)
    found = scored(fit(tokens, masks, one_device, head), *test)
    assert found.miou > learned and found.pixel_accuracy > learned
    shuffled = np.random.default_rng(0).permutation(masks)
    chance = scored(fit(tokens, shuffled, one_device, head), *test)
    assert chance.miou < 25 and chance.pixel_accuracy < 40


def test_the_linear_head_does_not_depend_on_devices(one_device):
    (tokens, masks), test = toy(50, seed=0), toy(33, seed=1)
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    fits = [fit(tokens, masks, x, batch_size=12) for x in (one_device, mesh)]
    one, eight = (jax.tree.map(np.asarray, fit.params["output"]) for fit in fits)
    np.testing.assert_allclose(one["kernel"], eight["kernel"], atol=1e-4)
    np.testing.assert_allclose(one["bias"], eight["bias"], atol=1e-4)
    scores = [scored(fits[0], *test, batch_size=size) for size in (8, 33, 64)]
    scores.append(scored(fits[1], *test, batch_size=8))
    assert len({s.miou for s in scores}) == 1


def test_training_is_repeatable_and_seeded(one_device):
    first, again, other = (
        np.asarray(fit(*toy(30, 0), one_device, steps=12, seed=seed).params["output"]["kernel"])
        for seed in (0, 0, 1)
    )
    assert (first == again).all() and (first != other).any()


def test_every_epoch_has_every_example_in_an_order_of_its_own():
    rows, other = (
        segmentation.order(7, HeadTrainingConfig(steps=5, batch_size=5, seed=x)) for x in (0, 1)
    )
    assert rows.shape == (5, 5) and (rows != other).any()
    epochs = rows.ravel()[:21].reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len(np.unique(epochs, axis=0)) == 3
