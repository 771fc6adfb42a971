"""Segmentation heads on toy tokens, and their scores against another way of counting."""

import jax
import numpy as np
import pytest

from supmim_jax import sharding
from supmim_jax.config import HeadTrainingConfig, MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import segmentation
from supmim_jax.models.segmentation import pixel_cross_entropy

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


def training(**changed) -> HeadTrainingConfig:
    return HeadTrainingConfig(**({"steps": 100, "learning_rate": 0.03} | changed))


def scored(segmenter: segmentation.Segmenter, tokens, masks, batch_size: int = 32):
    matrix = segmentation.confusions(segmenter, tokens, masks, batch_size=batch_size)
    return segmentation.score(matrix)


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
    for name in range(5):
        is_true = {i for i in labelled if truth.ravel()[i] == name}
        is_found = {i for i in labelled if predicted.ravel()[i] == name}
        either = is_true | is_found
        overlaps.append(100 * len(is_true & is_found) / len(either) if either else np.nan)
    np.testing.assert_allclose(scores.iou_V, overlaps)
    assert np.isnan(scores.iou_V[3]) and scores.iou_V[4] == 0
    assert scores.miou == pytest.approx(sum(overlaps[:3]) / 4)
    equal = [truth.ravel()[i] == predicted.ravel()[i] for i in labelled]
    assert scores.pixel_accuracy == pytest.approx(100 * np.mean(equal))


def test_a_head_classifies_whole_grids_as_their_tokens():
    """Masks as small as the grid: no upsampling, so a separable problem is solved completely."""
    tokens, masks = toy(40, seed=0)
    small = masks[:, 2::PATCH, 2::PATCH]
    test_tokens, test_masks = toy(50, seed=1)
    test = test_tokens, test_masks[:, 2::PATCH, 2::PATCH]
    options = {"classes": CLASSES, "head": "linear", "training": training()}
    scores = scored(segmentation.fit(tokens, small, **options), *test)
    assert scores.miou == scores.pixel_accuracy == 100.0


@pytest.mark.parametrize(("head", "learned"), [("linear", 60), ("conv", 70)])
def test_segments_are_learned_and_shuffled_masks_are_not(head, learned, one_device):
    (tokens, masks), test = toy(96, seed=0), toy(60, seed=1)
    options = {"classes": CLASSES, "head": head, "training": training(steps=60)}
    options["mesh"] = one_device
    found = scored(segmentation.fit(tokens, masks, **options), *test)
    assert found.miou > learned and found.pixel_accuracy > learned
    shuffled = np.random.default_rng(0).permutation(masks)
    chance = scored(segmentation.fit(tokens, shuffled, **options), *test)
    assert chance.miou < 25 and chance.pixel_accuracy < 40


def test_the_linear_head_does_not_depend_on_devices(one_device):
    tokens, masks = toy(50, seed=0)
    test = toy(33, seed=1)
    fits = [
        segmentation.fit(
            tokens,
            masks,
            classes=CLASSES,
            head="linear",
            training=training(batch_size=12),
            mesh=mesh,
        )
        for mesh in (one_device, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    ]
    one, eight = (jax.tree.map(np.asarray, fit.params["output"]) for fit in fits)
    np.testing.assert_allclose(one["kernel"], eight["kernel"], atol=1e-4)
    np.testing.assert_allclose(one["bias"], eight["bias"], atol=1e-4)
    scores = [scored(fits[0], *test, batch_size=size) for size in (8, 33, 64)]
    scores.append(scored(fits[1], *test, batch_size=8))
    assert len({s.miou for s in scores}) == 1


def test_training_is_repeatable_and_seeded(one_device):
    tokens, masks = toy(30, seed=0)
    kernels = [
        np.asarray(
            segmentation.fit(
                tokens,
                masks,
                classes=CLASSES,
                head="linear",
                training=training(steps=12, seed=seed),
                mesh=one_device,
            ).params["output"]["kernel"]
        )
        for seed in (0, 0, 1)
    ]
    assert (kernels[0] == kernels[1]).all() and (kernels[0] != kernels[2]).any()


def test_every_epoch_has_every_example_in_an_order_of_its_own():
    rows, other = (
        segmentation.order(7, training(steps=5, batch_size=5, seed=seed)) for seed in (0, 1)
    )
    assert rows.shape == (5, 5) and (rows != other).any()
    epochs = rows.ravel()[:21].reshape(3, 7)
    assert (np.sort(epochs, axis=1) == np.arange(7)).all()
    assert len(np.unique(epochs, axis=0)) == 3


def test_ignored_pixels_and_filling_rows_do_not_count():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 4, 4, CLASSES)).astype(np.float32)
    masks = random.integers(0, CLASSES, (3, 4, 4))
    masks[0, :2], masks[2] = -1, -1
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    losses = [-np.log(p[i][masks[i] == v][:, v]) for i in range(3) for v in range(CLASSES)]
    expected = np.concatenate(losses).mean()
    found = float(pixel_cross_entropy(logits, masks))
    assert found == pytest.approx(expected, rel=1e-5)
    assert float(pixel_cross_entropy(logits, np.full((3, 4, 4), -1))) == 0


def test_what_cannot_be_segmented_is_refused():
    tokens, masks = toy(10, seed=0)
    options = {"classes": CLASSES, "head": "linear", "training": training(steps=1)}
    for given, message in (
        ((tokens, masks + 1), r"labels \[4\]; known are 0 to 3, and -1"),
        ((tokens, masks[:-1]), r"\(10, 4, 4, 8\) and \(9, 20, 20\)"),
        ((tokens[:, 0], masks), "tokens NxHxWxD"),
    ):
        with pytest.raises(SetupError, match=message):
            segmentation.fit(*given, **options)
    with pytest.raises(SetupError, match="the known ones are linear, conv"):
        segmentation.fit(tokens, masks, **(options | {"head": "fpn"}))
    fitted = segmentation.fit(tokens, masks, **options)
    with pytest.raises(SetupError, match="No pixel"):
        scored(fitted, tokens, np.full_like(masks, -1))
