"""Masks: exact counts, inverse permutations, one mask per id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, stats

from supmim_jax.models import masking


@pytest.mark.parametrize("form", ["random", "block"])
@pytest.mark.parametrize(
    ("side", "ratio"), [(8, 0.25), (8, 0.5), (8, 0.75), (2, 0.5), (3, 0.99), (5, 0.01)]
)
def test_every_image_has_the_same_number_of_masked_patches(form, side, ratio):
    mask = masking.sample(form, ratio, side, jax.random.key(0), jnp.arange(20))
    count = min(max(round(side**2 * ratio), 1), side**2 - 1)  # one is masked, one kept
    assert (mask.masked.sum(1) == count).all() and masking.num_masked(side**2, ratio) == count
    for keep, hidden, restore, masked in zip(*map(np.asarray, mask)):
        order = np.concatenate([keep, hidden])
        assert (np.sort(order) == np.arange(side**2)).all() and len(hidden) == count
        assert masked[hidden].all() and not masked[keep].any()
        assert (order[restore] == np.arange(side**2)).all()


@pytest.mark.parametrize("form", ["random", "block"])
def test_a_mask_depends_on_key_and_id_alone(form):
    key = jax.random.key(2)
    whole = masking.sample(form, 0.5, 6, key, jnp.arange(10)).masked
    part = masking.sample(form, 0.5, 6, key, jnp.array([7, 2])).masked
    assert (part == whole[jnp.array([7, 2])]).all()
    assert len(np.unique(np.asarray(whole), axis=0)) == 10
    other = masking.sample(form, 0.5, 6, jax.random.key(3), jnp.arange(10)).masked
    assert (other != whole).any()


@pytest.mark.parametrize("form", ["random", "block"])
def test_drawn_ratios_are_of_mages_distribution_and_of_all_images_alike(form):
    """Mean 0.55, deviation 0.25, cut to [0.5, 1], rounded up to patches."""
    keys = jax.random.split(jax.random.key(1), 2000)
    ratios = np.asarray(jax.vmap(lambda key: masking.draw_ratio(0.55, 0.25, 0.5, key))(keys))
    expected = stats.truncnorm((0.5 - 0.55) / 0.25, (1 - 0.55) / 0.25, 0.55, 0.25)
    assert stats.kstest(ratios, expected.cdf).pvalue > 0.01
    for ratio in (ratios[0], 0.999):
        mask = masking.sample(form, jnp.float32(ratio), 8, keys[0], jnp.arange(5))
        assert (mask.masked.sum(1) == np.ceil(64 * ratio)).all()
        last = np.take_along_axis(np.asarray(mask.masked), np.asarray(mask.hidden), 1)
        assert (np.diff(last.astype(int)) >= 0).all() and mask.keep.shape == (5, 0)


def beit_masks(side: int, count: int, least: float, draws: int) -> np.ndarray:
    """BEiT's published block-wise masking, bool draws x side x side; at most `count` are masked."""
    rng, masks = np.random.default_rng(0), np.zeros((draws, side, side), bool)
    for mask in masks:
        failed = 0
        while mask.sum() < count and failed < 10:
            missing = count - mask.sum()
            area = least + (missing - least) * rng.random()
            aspect = 0.3 ** rng.uniform(-1, 1)
            height, width = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            failed += 1
            if height < side and width < side:
                top, left = rng.integers(side - height + 1), rng.integers(side - width + 1)
                block = mask[top : top + height, left : left + width]
                if 0 < (~block).sum() <= missing:
                    block[:] = True
                    failed = 0
    return masks


def shape(masks: np.ndarray) -> np.ndarray:
    """Of each mask: connected parts that are masked, parts that are kept, perimeter."""
    edges = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(int)
    perimeter = sum(np.abs(np.diff(edges, axis=axis)).sum((1, 2)) for axis in (1, 2))
    parts = [[ndimage.label(m)[1], ndimage.label(~m)[1]] for m in masks]
    return np.column_stack([parts, perimeter])


@pytest.mark.parametrize(
    ("side", "ratio", "least"), [(14, 75 / 196, 16), (16, 0.5, 20.9), (16, 0.75, 20.9)]
)
def test_block_masks_have_the_parts_and_the_perimeter_of_beits(side, ratio, least):
    """The first case is BEiT's own: 75 of 196 patches, at least 16 at a time.

    Its masks lack a patch or less on average, ours none: the last rectangle may add a part or two
    rows of edges. Standard errors of 500 are 0.03 parts and 0.4 edges. Noise per cell, instead of a
    cut along rows, gives twice the parts.
    """
    drawn = masking.sample("block", ratio, side, jax.random.key(0), jnp.arange(500)).masked
    ours = shape(np.asarray(drawn).reshape(-1, side, side))
    beits = shape(beit_masks(side, round(side**2 * ratio), least, 500))
    difference = ours.mean(0) - beits.mean(0)
    assert (abs(difference) < (0.25, 0.25, 2.5)).all(), difference
    assert 0.8 < ours[:, 2].std() / beits[:, 2].std() < 1.25


def test_rows_columns_and_ends_are_alike_in_block_masks():
    masked = masking.sample("block", 0.4, 8, jax.random.key(5), jnp.arange(3000)).masked
    often = np.asarray(masked).reshape(-1, 8, 8).mean(0)
    for turned in (often.T, often[::-1], often[:, ::-1]):
        assert abs(often - turned).max() < 0.06  # four standard errors of 0.013, of 64 places
