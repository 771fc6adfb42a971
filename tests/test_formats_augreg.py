"""Files of Google's ViTs, written by flax's own modules: read, they compute the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_features
from flax import traverse_util

from supmim_jax import import_weights

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
    for row, column, i in np.ndindex(side, side, WIDTH // 4):
        omega = 1 / 10_000 ** (i / (WIDTH // 4 - 1))
        waves = [wave(x * omega) for x in (column, row) for wave in (np.sin, np.cos)]
        out[row * side + column, i :: WIDTH // 4] = waves
    return out


IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


def written(path, root: str, scanned: bool, **options):
    """What a model computes whose arrays are in the file."""
    model, images = ViT(**options), IMAGES / 127.5 - 1
    rng = np.random.default_rng(1)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: 0.2 * rng.normal(size=x.shape).astype("f") + (path[-1].key == "scale"),
        jax.eval_shape(model.init, jax.random.key(0), images),
    )
    arrays = traverse_util.flatten_dict(variables["params"], sep="/")
    if scanned:
        for name in [k for k in arrays if "encoderblock_0" in k]:
            layers = [arrays.pop(name.replace("_0", f"_{i}", 1)) for i in range(DEPTH)]
            arrays[name.replace("encoderblock_0", "encoderblock")] = np.stack(layers)
    np.savez(path, **{f"{root}{name}": x for name, x in arrays.items()})
    return model.apply(variables, images)


@pytest.mark.parametrize(
    ("root", "scanned", "options"),
    [
        ("", False, {"positions": "augreg", "cls": True}),
        ("params/", True, {"positions": "learned"}),
        ("params/img/", False, {"positions": "learned", "cls": True}),
        ("", False, {"positions": "sincos2d"}),
        ("", False, {"positions": "sincos2d", "cls": True, "head": False}),
        ("", False, {"positions": "augreg", "cls": True, "pre_logits": True}),
    ],
)
def test_the_same_is_computed(supervised, tmp_path, capsys, root, scanned, options):
    pooled, logits = written(tmp_path / "x.npz", root, scanned, **options)
    cfg, params, _ = import_weights.load("augreg", tmp_path / "x.npz", supervised)
    assert (cfg.data.image_size, cfg.model.patch, cfg.model.depth) == (SIZE, PATCH, DEPTH)
    assert (cfg.data.channels, cfg.data.eval_resize) == (3, 22)
    found = make_features(cfg, params, IMAGES)
    np.testing.assert_allclose(found.pooled, pooled, atol=1e-4)
    if options.get("pre_logits") or logits is None:
        assert found.logits is None and cfg.objective.leaves == "encoder"
        assert ("left out head" in capsys.readouterr().out) == (logits is not None)
    else:
        np.testing.assert_allclose(found.logits, logits, atol=1e-4)
