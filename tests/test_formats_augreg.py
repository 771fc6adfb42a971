"""Files of Google's ViTs, written by flax's own modules: read, they compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_features
from flax import traverse_util

from supmim_jax import import_weights
from supmim_jax.config import changed
from supmim_jax.errors import SetupError

SIZE, PATCH, WIDTH, DEPTH, CLASSES = 20, 4, 32, 2, 5


class MlpBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(48)(x))
        return nn.Dense(WIDTH)(x)


class Encoder1DBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, y)
        return x + MlpBlock()(nn.LayerNorm()(x))


class AddPositionEmbs(nn.Module):
    @nn.compact
    def __call__(self, x):
        draw = nn.initializers.normal(0.1)
        return x + self.param("pos_embedding", draw, (1, x.shape[1], WIDTH))


class Encoder(nn.Module):
    adds_positions: bool

    @nn.compact
    def __call__(self, x):
        if self.adds_positions:
            x = AddPositionEmbs(name="posembed_input")(x)
        for i in range(DEPTH):
            x = Encoder1DBlock(name=f"encoderblock_{i}")(x)
        return nn.LayerNorm(name="encoder_norm")(x)


class ViT(nn.Module):
    """AugReg's, or big_vision's: these differ in where positions are added."""

    positions: str  # "augreg", "learned" or "sincos2d"
    cls: bool = False
    pre_logits: bool = False
    head: bool = True

    @nn.compact
    def __call__(self, images):
        x = nn.Conv(WIDTH, (PATCH, PATCH), (PATCH, PATCH), "VALID", name="embedding")(images)
        x = x.reshape(len(x), -1, WIDTH)
        draw = nn.initializers.normal(0.1)
        if self.positions == "learned":
            x = x + self.param("pos_embedding", draw, (1, x.shape[1], WIDTH))
        if self.positions == "sincos2d":
            x = x + sincos2d(SIZE // PATCH)
        if self.cls:
            cls = self.param("cls", draw, (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        x = Encoder(self.positions == "augreg", name="Transformer")(x)
        pooled = x[:, 0] if self.cls else x.mean(axis=1)
        y = nn.tanh(nn.Dense(WIDTH, name="pre_logits")(pooled)) if self.pre_logits else pooled
        return pooled, nn.Dense(CLASSES, name="head")(y) if self.head else None


def sincos2d(side: int) -> np.ndarray:
    """Element by element, after big_vision's documentation of it."""
    out = np.zeros((side * side, WIDTH))
    quarter = WIDTH // 4
    for row in range(side):
        for column in range(side):
            for i in range(quarter):
                omega = 1 / 10_000 ** (i / (quarter - 1))
                waves = np.sin(column * omega), np.cos(column * omega)
                waves += np.sin(row * omega), np.cos(row * omega)
                out[row * side + column, i::quarter] = waves
    return out


IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def written(path, root="", **options):
    """The arrays of a model in a file, and what it computes."""
    model = ViT(**options)
    images = IMAGES / 127.5 - 1
    variables = model.init(jax.random.key(0), images)
    variables = jax.tree.map(
        lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), variables
    )
    arrays = traverse_util.flatten_dict(variables["params"], sep="/")
    np.savez(path, **{f"{root}{name}": x for name, x in arrays.items()})
    return arrays, *model.apply(variables, images)


@pytest.mark.parametrize(
    ("root", "options"),
    [
        ("", {"positions": "augreg", "cls": True}),
        ("params/", {"positions": "learned"}),
        ("params/img/", {"positions": "learned", "cls": True}),
        ("", {"positions": "sincos2d"}),
        ("", {"positions": "sincos2d", "cls": True, "head": False}),
        ("", {"positions": "augreg", "cls": True, "pre_logits": True}),
    ],
)
def test_the_same_is_computed(supervised, tmp_path, root, options, capsys):
    _, pooled, logits = written(tmp_path / "x.npz", root, **options)
    cfg, params, _ = import_weights.load("augreg", tmp_path / "x.npz", supervised)
    assert (cfg.data.image_size, cfg.model.patch, cfg.model.depth) == (SIZE, PATCH, DEPTH)
    found = make_features(cfg, params, IMAGES)
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-4)
    if options.get("pre_logits") or logits is None:
        assert found.logits is None and cfg.objective.leaves == "encoder"
        assert ("left out head" in capsys.readouterr().out) == (logits is not None)
    else:
        np.testing.assert_allclose(found.logits, logits, atol=1e-4)


def test_layers_that_were_scanned(supervised, tmp_path):
    arrays, pooled, _ = written(tmp_path / "x.npz", positions="learned")
    stacked = {k: x for k, x in arrays.items() if "encoderblock" not in k}
    for name in [k for k in arrays if "encoderblock_0" in k]:
        layers = [arrays[name.replace("_0", f"_{i}", 1)] for i in range(DEPTH)]
        stacked[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    np.savez(tmp_path / "y.npz", **stacked)
    cfg, params, _ = import_weights.load("augreg", tmp_path / "y.npz", supervised)
    np.testing.assert_allclose(make_features(cfg, params, IMAGES).pooled, pooled, atol=1e-4)


def test_what_this_encoder_has_not_is_named(supervised, tmp_path):
    arrays, *_ = written(tmp_path / "x.npz", positions="sincos2d")
    refused = {
        "MAPHead_0.*attention pooling": arrays
        | {"MAPHead_0/probe": np.zeros((1, 1, WIDTH), np.float32)},
        "embedding/kernel is there 0 times": {},
        "embedding/kernel is there 2 times": arrays
        | {"img/embedding/kernel": arrays["embedding/kernel"]},
        "nothing as MlpBlock": {k: x for k, x in arrays.items() if "MlpBlock" not in k},
    }
    for message, found in refused.items():
        np.savez(tmp_path / "y.npz", **found)
        with pytest.raises(SetupError, match=message):
            import_weights.load("augreg", tmp_path / "y.npz", supervised)
    other = changed(supervised, data={"image_size": 24}, model={"patch": 8})
    assert import_weights.load("augreg", tmp_path / "x.npz", other)[0].data.image_size == 24
    odd = changed(supervised, data={"image_size": 18}, model={"patch": 6})
    with pytest.raises(SetupError, match=r"18 is no multiple of its patches of 4.*image_size"):
        import_weights.load("augreg", tmp_path / "x.npz", odd)
