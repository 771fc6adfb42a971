"""ViT, decoder and patch tokenizer on small inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from supmim_jax.config import DataConfig, PatchCodesConfig, ViTConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.models import kmeans, masking, vit
from supmim_jax.models.transformer import _keep, dropout

DATA = DataConfig(image_size=16, eval_resize=16, channels=3)
SMALL = ViTConfig(patch=4, width=32, depth=2, mlp_dim=64, heads=2)
IMAGES = np.random.default_rng(0).uniform(-1, 1, (3, 16, 16, 3)).astype(np.float32)


def encoder(**changes) -> vit.ViT:
    return vit.ViT(changed(SMALL, **changes), DATA, rngs=nnx.Rngs(0))


def test_patches_are_in_row_order_and_come_back():
    patches = vit.patchify(jnp.asarray(IMAGES), 4)
    assert (patches[1, 6] == IMAGES[1, 4:8, 8:12].reshape(-1)).all()
    assert (vit.unpatchify(patches, 4, 4) == IMAGES).all()


FORMS = [{}, {"pooling": "cls"}, {"positions": "sincos2d"}, {"registers": 3}]


@pytest.mark.parametrize("changes", [*FORMS, {"registers": 2, "pooling": "cls"}])
def test_packed_inputs_do_not_see_each_other(changes):
    model = encoder(**changes)
    mask = masking.sample("random", 0.5, 4, jax.random.key(0), jnp.arange(3))
    full, kept = model.embed(IMAGES), model.embed(IMAGES, visible=mask)
    assert full.shape[1] == 16 + model.prefix and kept.shape[1] == 8 + model.prefix
    packed = model.encode((full, kept))
    alone = model.encode((full,))[0], model.encode((kept,))[0]
    for a, b in zip(packed, alone):
        np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_registers_change_what_is_pooled_and_are_not_pooled(pooling):
    model = encoder(pooling=pooling, registers=2)
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16 + model.prefix, 32)))
    first = model.prefix - 2
    assert (model.pool(tokens) == model.pool(tokens.at[:, first : first + 2].set(9.0))).all()
    before = model.features(IMAGES)
    model.registers[...] += 1.0
    after = model.features(IMAGES)
    assert (before.pooled != after.pooled).any() and after.tokens.shape == (3, 4, 4, 32)


def test_visible_patches_are_those_of_the_whole_image_and_masked_pixels_are_hidden():
    model = encoder()
    mask = masking.sample("random", 0.5, 4, jax.random.key(0), jnp.arange(3))
    kept = jnp.take_along_axis(model.embed(IMAGES), mask.keep[..., None], axis=1)
    np.testing.assert_allclose(model.embed(IMAGES, visible=mask), kept, atol=1e-6)
    hidden = vit.unpatchify(jnp.repeat(mask.masked[..., None], 48, axis=2), 4, 4)
    other = jnp.where(hidden, -IMAGES, IMAGES)
    for arguments in ({"visible": mask}, {"masked": (mask, jnp.ones(32))}):
        assert (model.embed(IMAGES, **arguments) == model.embed(other, **arguments)).all()
    assert (model.embed(IMAGES) != model.embed(other)).any()


@pytest.mark.parametrize("name", ["dropout", "drop_path"])
def test_what_is_dropped_depends_on_the_key_and_nothing_is_without_one(name):
    plain, model = (encoder(depth=3, **{name: rate}) for rate in (0.0, 0.5))
    nnx.update(model, nnx.state(plain))
    kept = plain.features(IMAGES).pooled
    assert (model.features(IMAGES).pooled == kept).all()
    first, again, other = (model.features(IMAGES, jax.random.key(i)).pooled for i in (0, 0, 1))
    assert (first == again).all() and (first != other).any() and (first != kept).any()
    assert jnp.isfinite(first).all()


def test_the_input_and_the_branches_drop_the_rate_that_is_asked_for():
    x = dropout(jnp.ones((1000, 100)), 0.25, jax.random.key(0))
    assert set(np.unique(x)) == {0.0, np.float32(1 / 0.75)}
    assert abs(float((x == 0).mean()) - 0.25) < 0.005
    model = encoder(dropout=0.5, depth=1)  # blocks that add nothing: what is left is the input's
    for layer in (model.transformer.blocks.out, model.transformer.blocks.fc2):
        layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    zero = model.transformer(jnp.ones((3, 16, 32)), (16,), jax.random.key(0)) == 0
    assert abs(float(zero.mean()) - 0.5) < 0.05
    keep = _keep(jax.random.key(0), 0.25, 4000, (3, 2))
    assert keep.shape == (2, 4000, 5, 1) and abs(float(keep.mean()) - 1.0) < 0.02
    assert (keep[:, :, 0] == keep[:, :, 2]).all() and (keep[:, :, 0] != keep[:, :, 3]).any()


@pytest.mark.parametrize("remat", ["names", "full"])
def test_remat_changes_nothing_but_memory(remat):
    def gradient(policy):
        graph, params = nnx.split(encoder(remat=policy), nnx.Param)

        def loss(p):
            model = nnx.merge(graph, p)
            return (model.encode((model.embed(IMAGES),))[0] ** 3).sum()

        return nnx.to_pure_dict(jax.grad(loss)(params))

    for a, b in zip(*(jax.tree.leaves(gradient(policy)) for policy in ("none", remat))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_layer_scale_starts_near_the_identity():
    model = encoder(layer_scale=1e-6)
    tokens = model.embed(IMAGES)
    np.testing.assert_allclose(model.transformer(tokens, (16,)), tokens, atol=1e-4)
    model = encoder(layer_scale=1e-4, dtype="bfloat16")
    tokens = model.embed(IMAGES)
    assert (model.transformer(tokens, (16,)) != tokens).mean() > 0.9  # not rounded away


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_parameters():
    model = encoder(dtype="bfloat16")
    assert model.encode((model.embed(IMAGES),))[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(nnx.split(model, nnx.Param)[1])} == {
        np.dtype("float32")
    }


@pytest.mark.parametrize("normalize", ["raw", "luminance"])
def test_patch_codes_are_the_nearest_centres(normalize):
    cfg = PatchCodesConfig(codes=12, normalize=normalize)
    uint8 = np.random.default_rng(1).integers(0, 256, (20, 16, 16, 3), np.uint8)
    fitted = kmeans.fit(cfg, 4, uint8, seed=0)
    tokenizer = kmeans.PatchCodes(cfg, 4, DATA)
    tokenizer.codes[...] = fitted["codes"]
    images = vit.pixels(jnp.asarray(uint8))
    patches = kmeans.described(images, 4, normalize)
    distance = ((np.asarray(patches)[:, :, None] - fitted["codes"]) ** 2).sum(-1)
    ids = tokenizer.encode(images)
    assert (np.asarray(ids) == distance.argmin(-1)).all() and len(np.unique(ids)) == 12
    channels = fitted["codes"].shape[1] // 16
    assert channels == (3 if normalize == "raw" else 1)
    shown = vit.patchify(tokenizer.decode(ids)[..., :channels], 4)
    assert (shown[0, 3] == fitted["codes"][ids[0, 3]]).all()


def test_luminance_tokens_see_neither_colour_nor_brightness():
    cfg = PatchCodesConfig(codes=12, normalize="luminance")
    grey = np.random.default_rng(1).uniform(-0.2, 0.2, (20, 16, 16, 1)).astype(np.float32)
    tint = np.array([0.3, -0.5, 0.4], np.float32)
    tint -= tint @ [0.299, 0.587, 0.114]  # a hue without luma
    tokenizer = kmeans.PatchCodes(cfg, 4, DATA)
    tokenizer.codes[...] = np.random.default_rng(2).standard_normal((12, 16)).astype(np.float32)
    ids = tokenizer.encode(grey.repeat(3, -1))
    assert (tokenizer.encode(grey + tint) == ids).mean() > 0.99
    assert (tokenizer.encode(2.0 * grey.repeat(3, -1) + 0.3) == ids).mean() > 0.9
    raw = kmeans.PatchCodes(PatchCodesConfig(codes=12), 4, DATA)
    raw.codes[...] = np.random.default_rng(2).uniform(-1, 1, (12, 48)).astype(np.float32)
    assert (raw.encode(grey + tint) == raw.encode(grey.repeat(3, -1))).mean() < 0.9


def test_a_bad_codebook_is_refused(tmp_path):
    good, cut, cfg = tmp_path / "codes.npz", tmp_path / "cut.npz", PatchCodesConfig(codes=4)
    np.savez(good, codes=np.zeros((4, 16), np.float32))
    cut.write_bytes(good.read_bytes()[:100])
    assert (kmeans.load(epath.Path(good), cfg, 4, 1)["codes"] == 0).all()
    for path, channels, message in (
        (good, 3, r"\(4, 16\).*\(4, 48\)"),
        (tmp_path / "missing.npz", 1, "missing.npz"),
        (cut, 1, "cut.npz"),
    ):
        with pytest.raises(SetupError, match=message):
            kmeans.load(epath.Path(path), cfg, 4, channels)
    with pytest.raises(SetupError, match=r"1 distinct patches, and .* is 4"):
        kmeans.fit(cfg, 4, np.zeros((2, 16, 16, 1), np.uint8), seed=0)
