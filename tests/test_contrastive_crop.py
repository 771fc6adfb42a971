"""ContrastiveCrop: where crops lie, against a sampler written from the published description."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from supmim_jax.config import ContrastiveCropConfig, DataConfig
from supmim_jax.data import transforms

SAMPLES = 8000
WHOLE = (0, 0, 255, 255)
BOXES = {"whole": WHOLE, "centre": transforms.CENTRE, "corner": (20, 120, 140, 255)}
SIZES = [(375, 500), (500, 333), (64, 64)]


def config(alpha=0.6, boxes="heat_map", crop="contrastive", **changes) -> DataConfig:
    contrastive = ContrastiveCropConfig(boxes=boxes, alpha=alpha)
    sizes = {"image_size": 8, "eval_resize": 8, "min_crop_area": 0.2}
    return DataConfig(channels=3, crop=crop, contrastive_crop=contrastive, **(sizes | changes))


def drawn(cfg, size, bounds, count=SAMPLES) -> np.ndarray:
    """count x 4: top, left, height and width of crops of the ids from 0."""
    rngs = (transforms.generator(5, 0, i, transforms.GEOMETRY) for i in range(count))
    return np.array([transforms.draw_crop(*size, cfg, rng, bounds).box for rng in rngs])


def published(alpha, least, size, bounds, seed=0, count=SAMPLES) -> np.ndarray:
    """The same of the description in the paper and its code, all crops at once; None is uniform."""
    random = np.random.Generator(np.random.PCG64(seed))
    height, width = size
    area = height * width * random.uniform(least, 1.0, (10, count))
    aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), (10, count)))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w <= width) & (h <= height) & (w > 0) & (h > 0)
    chosen = fits.argmax(0), np.arange(count)
    w, h = w[chosen], h[chosen]
    corner = []
    for full, part, edges in ((height, h, bounds[::2]), (width, w, bounds[1::2])):
        first, last = (
            np.clip(np.floor(full * (edge / 255)) - part // 2, 0, full - part) for edge in edges
        )
        if alpha is None:
            offset = np.floor((last - first + 1) * random.uniform(size=count))
        else:
            offset = np.floor((last - first) * random.beta(alpha, alpha, count))
        corner.append(first + offset)
    found = np.stack([*corner, h, w], 1)
    side = min(size)
    found[~fits.any(0)] = [(height - side) // 2, (width - side) // 2, side, side]
    return found


def agreement(ours: np.ndarray, theirs: np.ndarray, size) -> dict[str, float]:
    """p of the two-sample Kolmogorov-Smirnov test, by what is compared."""

    def described(boxes: np.ndarray) -> dict[str, np.ndarray]:
        top, left, height, width = boxes.astype(float).T
        centre = {"row": (top + height / 2) / size[0], "column": (left + width / 2) / size[1]}
        return centre | {"area": height * width, "aspect": width / height}

    ours, theirs = described(ours), described(theirs)
    return {name: ks_2samp(x, theirs[name]).pvalue for name, x in ours.items()}


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("box", list(BOXES))
def test_crops_are_distributed_as_published(box, size, alpha):
    ours = drawn(config(alpha), size, BOXES[box])
    found = agreement(ours, published(alpha, 0.2, size, BOXES[box]), size)
    assert all(p > 1e-3 for p in found.values()), found
    for wrong in {0.1, 0.6, 1.0} - {alpha}:
        found = agreement(ours, published(wrong, 0.2, size, BOXES[box]), size)
        assert found["row"] < 1e-4 and found["column"] < 1e-4 and found["area"] > 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_plain_crops_are_uniform(size):
    ours = drawn(config(crop="inception"), size, None)
    found = agreement(ours, published(None, 0.2, size, WHOLE), size)
    assert all(p > 1e-3 for p in found.values()), found


edge = st.integers(0, 255)


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.tuples(edge, edge, edge, edge),
    st.sampled_from([1e-3, 0.1, 0.6, 1.0, 50.0, 1e6]),
    st.sampled_from([0.0, 0.05, 0.9, 1.0]),
    st.integers(0, 2**31 - 1),
)
@settings(max_examples=400, deadline=None)
def test_a_crop_is_inside_the_image_and_depends_on_its_arguments_alone(
    height, width, bounds, alpha, least, seed
):
    """Boxes without extent and with their edges swapped are among them."""
    cfg = config(alpha, min_crop_area=least)
    bounds = np.array(bounds, np.uint8)
    for i in range(5):
        crop = transforms.draw_crop(height, width, cfg, transforms.generator(seed, 0, i, 0), bounds)
        top, left, h, w = crop.box
        assert crop.extent == (height, width) and all(type(x) is int for x in crop.box)
        assert 0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h and w
        again = transforms.draw_crop(
            height, width, cfg, transforms.generator(seed, 0, i, 0), bounds
        )
        assert again == crop


def test_ten_misses_give_the_square_in_the_middle():
    for height, width in ((1, 3000), (9, 300), (3000, 7)):
        side = min(height, width)
        found = drawn(config(min_crop_area=0.05), (height, width), (255, 255, 0, 0), 50)
        assert (found == [(height - side) // 2, (width - side) // 2, side, side]).all()


def test_a_tight_box_is_in_every_crop():
    bounds = np.array([200, 40, 210, 50], np.uint8)
    top, left, height, width = drawn(config(), (300, 400), bounds, 500).T
    rows, columns = 300 / 255 * bounds[::2], 400 / 255 * bounds[1::2]
    assert (top <= rows[0]).all() and (top + height >= rows[1] - 1).all()
    assert (left <= columns[0]).all() and (left + width >= columns[1] - 1).all()


def test_a_box_without_extent_is_the_middle_of_crops_that_have_room():
    found = drawn(config(min_crop_area=0.02), (400, 400), (102, 153, 102, 153), 500)
    free = (found[:, 2:] < 160).all(1)  # 160 pixels above the point, 160 right of it
    assert free.sum() > 20
    assert (found[free, :2] + found[free, 2:] // 2 == (160, 240)).all()


def test_fixed_boxes_need_no_table_and_plain_crops_come_before_the_first():
    fixed = drawn(config(boxes="centre"), (60, 80), None, 100)
    assert (fixed == drawn(config(), (60, 80), transforms.CENTRE, 100)).all()
    assert (fixed == drawn(config(boxes="centre"), (60, 80), (0, 0, 9, 9), 100)).all()
    plain = drawn(config(), (60, 80), None, 100)
    assert (plain == drawn(config(crop="inception"), (60, 80), None, 100)).all()
    assert (plain != fixed).any()
    quarter = np.array(transforms.CENTRE) / 255
    assert np.allclose(quarter, (0.25, 0.25, 0.75, 0.75), atol=1 / 255)


def test_inception_crops_are_what_they_were():
    """Golden numbers: where they change, runs and token caches go on with other crops."""
    cfg = config(crop="inception", min_crop_area=0.05)
    found = [
        transforms.draw_crop(60, 80, cfg, transforms.generator(3, 1, i, transforms.GEOMETRY))
        for i in range(4)
    ]
    boxes = [(3, 6, 51, 67), (6, 27, 29, 38), (1, 23, 29, 25), (29, 36, 29, 33)]
    assert [tuple(crop.box) for crop in found] == boxes
    assert [crop.mirrored for crop in found] == [True, False, False, False]
