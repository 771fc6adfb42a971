"""Masks: exact counts, inverse permutations, one mask per id."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from supmim_jax.models import masking


@pytest.mark.parametrize("form", ["random", "block"])
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_every_image_has_the_same_number_of_masked_patches(form, ratio):
    mask = masking.sample(form, ratio, 8, jax.random.key(0), jnp.arange(20))
    assert (mask.masked.sum(1) == round(64 * ratio)).all()
    assert mask.keep.shape == (20, 64 - round(64 * ratio))
    assert not jnp.take_along_axis(mask.masked, mask.keep, axis=1).any()
    assert jnp.take_along_axis(mask.masked, mask.hidden, axis=1).all()
    assert (jnp.sort(jnp.concatenate([mask.keep, mask.hidden], 1)) == jnp.arange(64)).all()


def test_restore_puts_kept_and_masked_patches_back():
    mask = masking.sample("random", 0.5, 4, jax.random.key(1), jnp.arange(3))
    for keep, hidden, restore, masked in zip(*map(np.asarray, mask)):
        order = np.concatenate([keep, hidden])
        assert (order[restore] == np.arange(16)).all()
        assert (restore[masked] >= len(keep)).all()


@pytest.mark.parametrize("form", ["random", "block"])
def test_a_mask_depends_on_key_and_id_alone(form):
    key = jax.random.key(2)
    whole = masking.sample(form, 0.5, 6, key, jnp.arange(10)).masked
    part = masking.sample(form, 0.5, 6, key, jnp.array([7, 2])).masked
    assert (part == whole[jnp.array([7, 2])]).all()
    assert len(np.unique(np.asarray(whole), axis=0)) == 10
    other = masking.sample(form, 0.5, 6, jax.random.key(3), jnp.arange(10)).masked
    assert (other != whole).any()


def test_block_masks_are_clumped_and_random_ones_are_not():
    def like_neighbours(form):
        masked = masking.sample(form, 0.5, 14, jax.random.key(0), jnp.arange(64)).masked
        grid = np.asarray(masked).reshape(64, 14, 14)
        return (grid[:, 1:] == grid[:, :-1]).mean()

    assert like_neighbours("random") < 0.55 and like_neighbours("block") > 0.8


def test_at_least_one_patch_is_masked_and_one_kept():
    assert [masking.num_masked(4, r) for r in (0.01, 0.5, 0.99)] == [1, 2, 3]
