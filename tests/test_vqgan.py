"""The VQGAN against an independent model of MaskGIT's, written in linen as theirs is."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import linen, nnx, serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from supmim_jax.config import VQGANConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.models import Frozen, freeze, vqgan
from supmim_jax.models.vqgan import VQGAN
from supmim_jax.train_step import TrainStep

SMALL = VQGANConfig(filters=16, multipliers=(1, 2, 2), res_blocks=2, groups=8, codes=32, code_dim=8)


class ResBlock(linen.Module):
    """MaskGIT's block: the 1x1 shortcut reads what the second convolution gave."""

    filters: int
    groups: int

    @linen.compact
    def __call__(self, x):
        y = x
        for _ in range(2):
            y = jax.nn.silu(linen.GroupNorm(self.groups)(y))
            y = linen.Conv(self.filters, (3, 3), use_bias=False)(y)
        if x.shape[-1] == self.filters:
            return y + x
        return y + linen.Conv(self.filters, (1, 1), use_bias=False)(y)


class Encoder(linen.Module):
    cfg: VQGANConfig

    @linen.compact
    def __call__(self, x):
        c = self.cfg
        x = linen.Conv(c.filters, (3, 3), use_bias=False)(x)
        for i, multiplier in enumerate(c.multipliers):
            for _ in range(c.res_blocks):
                x = ResBlock(c.filters * multiplier, c.groups)(x)
            if i + 1 < len(c.multipliers):
                b, h, w, d = x.shape
                x = x.reshape(b, h // 2, 2, w // 2, 2, d).mean((2, 4))
        for _ in range(c.res_blocks):
            x = ResBlock(c.filters * c.multipliers[-1], c.groups)(x)
        return linen.Conv(c.code_dim, (1, 1))(jax.nn.silu(linen.GroupNorm(c.groups)(x)))


class Decoder(linen.Module):
    cfg: VQGANConfig

    @linen.compact
    def __call__(self, x):
        c = self.cfg
        x = linen.Conv(c.filters * c.multipliers[-1], (3, 3))(x)
        for _ in range(c.res_blocks):
            x = ResBlock(c.filters * c.multipliers[-1], c.groups)(x)
        for i in range(len(c.multipliers) - 1, -1, -1):
            for _ in range(c.res_blocks):
                x = ResBlock(c.filters * c.multipliers[i], c.groups)(x)
            if i:
                b, h, w, d = x.shape
                x = jax.image.resize(x, (b, 2 * h, 2 * w, d), "nearest")
                x = linen.Conv(d, (3, 3))(x)
        return linen.Conv(3, (3, 3))(jax.nn.silu(linen.GroupNorm(c.groups)(x)))


class Quantizer(linen.Module):
    cfg: VQGANConfig

    @linen.compact
    def __call__(self, z):
        draw = jax.nn.initializers.normal(1.0)
        codes = self.param("codebook", draw, (self.cfg.codes, self.cfg.code_dim))
        ids = ((z[..., None, :] - codes) ** 2).sum(-1).argmin(-1)
        return ids, codes[ids]


class Tokenizer(linen.Module):
    """Images in [0, 1] to (ids, images): the whole of it, with MaskGIT's names."""

    cfg: VQGANConfig

    def setup(self):
        self.encoder, self.decoder = Encoder(self.cfg), Decoder(self.cfg)
        self.quantizer = Quantizer(self.cfg)

    def __call__(self, images):
        ids, codes = self.quantizer(self.encoder(images))
        return ids, self.decoder(codes)


def ours(cfg: VQGANConfig, side: int, size: int) -> tuple[VQGAN, dict]:
    model = VQGAN(cfg, channels=3, side=side, size=size, rngs=nnx.Rngs(0))
    freeze(model)
    return model, nnx.to_pure_dict(nnx.split(model, Frozen)[1])


def perturbed(tree, seed: int = 0):
    """Norm scales and biases off their initial ones and zeros, so that a swap shows."""
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + 0.3 * random.standard_normal(x.shape, np.float32), tree)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file in the published form, the model that wrote it, and its variables."""
    model = Tokenizer(SMALL)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    variables = {"params": perturbed(variables["params"])}
    path = epath.Path(tmp_path_factory.mktemp("maskgit")) / "tokenizer"
    path.write_bytes(serialization.to_bytes(variables))
    return path, model, variables


def test_maskgits_weights_give_maskgits_ids_and_images(published):
    path, linen_model, variables = published
    images = np.random.default_rng(1).uniform(0, 1, (5, 16, 16, 3)).astype(np.float32)
    ids, again = linen_model.apply(variables, images)
    model, like = ours(SMALL, side=4, size=16)
    nnx.update(model, vqgan.load_maskgit(path, SMALL, like))
    found = model.encode(images * 2.0 - 1.0)
    assert (np.asarray(found).reshape(5, 4, 4) == ids).all() and len(np.unique(ids)) > 8
    np.testing.assert_allclose(model.decode(found), again * 2.0 - 1.0, atol=1e-4)


def test_the_published_architecture_has_the_published_tree():
    """The default config, by shapes alone: 54 million parameters under MaskGIT's names."""
    cfg = VQGANConfig()
    images = jax.ShapeDtypeStruct((1, 256, 256, 3), jnp.float32)
    theirs = jax.eval_shape(Tokenizer(cfg).init, jax.random.key(0), images)["params"]
    theirs = {k: x.shape for k, x in flatten_dict(theirs, sep="/").items()}
    model = jax.eval_shape(lambda: nnx.split(ours(cfg, 16, 256)[0])[1])
    mine = flatten_dict(nnx.to_pure_dict(model), sep="/")
    assert {vqgan.maskgit_name(k, cfg): x.shape for k, x in mine.items()} == theirs
    assert theirs["encoder/ResBlock_4/Conv_2/kernel"] == (1, 1, 256, 256)
    assert theirs["quantizer/codebook"] == (1024, 256)


def test_a_patch_of_another_size_is_one_token_all_the_same(published):
    """ViT-B/14 at 224 px with tokens of 16 px, in small: 3 px patches with tokens of 4 px."""
    path, _, _ = published
    model, like = ours(SMALL, side=5, size=15)
    nnx.update(model, vqgan.load_maskgit(path, SMALL, like))
    images = jax.random.uniform(jax.random.key(0), (2, 15, 15, 3), minval=-1)
    ids = model.encode(images)
    enlarged, _ = ours(SMALL, side=5, size=20)
    nnx.update(enlarged, nnx.split(model)[1])
    assert ids.shape == (2, 25) and model.decode(ids).shape == (2, 15, 15, 3)
    assert (enlarged.encode(jax.image.resize(images, (2, 20, 20, 3), "cubic")) == ids).all()


def written(tmp_path, tree) -> epath.Path:
    path = epath.Path(tmp_path) / "tokenizer"
    path.write_bytes(serialization.msgpack_serialize(tree))
    return path


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("encoder/Conv_0/kernel", None, r"encoder/Conv_0/kernel float32\[3, 3, 3, 16\] is"),
        ("encoder/Conv_9/kernel", np.zeros(3, np.float32), "encoder/Conv_9/kernel is not of this"),
        ("decoder/Conv_3/bias", np.zeros(4, np.float32), r"float32\[4\], expected float32\[3\]"),
        ("quantizer/codebook", np.zeros((32, 8), np.float64), r"codebook is float64\[32, 8\]"),
        ("decoder/Conv_3/bias", "text", "decoder/Conv_3/bias is str"),
    ],
)
def test_a_tree_that_differs_is_refused_with_its_path(published, tmp_path, name, value, message):
    flat = flatten_dict(jax.tree.map(np.asarray, published[2]["params"]), sep="/") | {name: value}
    flat = {k: x for k, x in flat.items() if x is not None}
    path = written(tmp_path, {"params": unflatten_dict(flat, sep="/")})
    with pytest.raises(SetupError, match=message):
        vqgan.load_maskgit(path, SMALL, ours(SMALL, 4, 16)[1])


def test_half_precision_and_collections_beside_the_parameters_are_read(published, tmp_path):
    half = jax.tree.map(lambda x: np.asarray(x, np.float16), published[2]["params"])
    tree = {"params": half, "batch_stats": {"x": np.zeros(3, np.float32)}, "step": np.int32(7)}
    found = vqgan.load_maskgit(written(tmp_path, tree), SMALL, ours(SMALL, 4, 16)[1])
    expected = np.asarray(half["quantizer"]["codebook"], np.float32)
    np.testing.assert_array_equal(found["codebook"], expected)


def test_a_file_that_is_cut_or_no_msgpack_is_refused(published, tmp_path):
    like = ours(SMALL, 4, 16)[1]
    data, path = published[0].read_bytes(), epath.Path(tmp_path) / "tokenizer"
    for bad in (None, data[: len(data) // 2], data[:-3], b"", b"\x00nothing", pickle.dumps({})):
        if bad is not None:
            path.write_bytes(bad)
        with pytest.raises(SetupError, match=str(path)):
            vqgan.load_maskgit(path, SMALL, like)


def test_a_frozen_tokenizer_is_an_argument_of_the_step_and_not_in_its_state(cfg, one_device):
    built = TrainStep.build(changed(cfg, objective={"target": SMALL}), one_device)
    assert "codebook" in built.frozen["target"]["tokenizer"]
    assert "codebook" not in str(jax.tree_util.tree_leaves_with_path(built.state))
