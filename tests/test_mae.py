"""MAE: its loss by hand, on one batch, what it may not see, and what its picture shows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch
from flax import nnx

from supmim_jax import checkpoint, train_step, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    CMAEConfig,
    Config,
    DataConfig,
    DecoderConfig,
    MAEConfig,
    OptimConfig,
    PixelsConfig,
    ViTConfig,
)
from supmim_jax.errors import SetupError
from supmim_jax.models import masking
from supmim_jax.models.decoder import Decoder
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.cmae import CMAE
from supmim_jax.objectives.mae import MAE

DECODER = DecoderConfig(width=32, mlp_dim=64, heads=2)


@pytest.fixture
def mae(cfg) -> Config:
    """MAE with a CLS token on the images of `cfg`."""
    model = dataclasses.replace(cfg.model, pooling="cls", positions="sincos2d", drop_path=0.0)
    return dataclasses.replace(cfg, model=model, objective=MAEConfig(decoder=DECODER))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_of_a_model_of_four_patches_by_hand(normalize):
    """2x2 patches of 2x2 pixels, width 4, with blocks that add nothing: all else is arithmetic."""
    cfg = Config(
        data=DataConfig(image_size=4, eval_resize=4),
        model=ViTConfig(patch=2, width=4, depth=1, mlp_dim=4, heads=1, pooling="cls"),
        objective=MAEConfig(
            mask_ratio=0.5,
            normalize_patches=normalize,
            decoder=DecoderConfig(depth=1, width=4, mlp_dim=4, heads=1),
        ),
    )
    model = MAE(cfg, rngs=nnx.Rngs(0))
    for stack in (model.encoder.transformer.blocks, model.decoder.transformer.blocks):
        for layer in (stack.out, stack.fc2):
            layer.kernel[...] = jnp.zeros_like(layer.kernel[...])
    batch = make_batch(dataclasses.replace(cfg, batch_size=3))
    batch = dataclasses.replace(batch, weight=np.array([1, 0, 1], np.float32))
    key = jax.random.key(5)
    found, terms = model.loss(batch, key)

    images = np.asarray(batch.views[0], np.float64)[..., 0] / 127.5 - 1
    corners = [images[:, r : r + 2, c : c + 2] for r in (0, 2) for c in (0, 2)]
    x = np.stack(corners, 1).reshape(3, 4, 4)
    w = jax.tree.map(np.float64, nnx.to_pure_dict(nnx.split(model, nnx.Param, ...)[1]))
    masked = np.asarray(model.mask(jax.random.split(key)[1], batch.id).masked)
    assert (masked.sum(1) == 2).all()

    def norm(t, p):
        t = (t - t.mean(-1, keepdims=True)) / np.sqrt(t.var(-1, keepdims=True) + 1e-6)
        return t * p["scale"] + p["bias"]

    def linear(t, p):
        return t @ p["kernel"] + p["bias"]

    encoder, decoder = w["encoder"], w["decoder"]
    tokens = norm(linear(x, encoder["patches"]) + encoder["positions"], encoder["norm"])
    tokens = linear(tokens, decoder["embed"])
    tokens = np.where(masked[..., None], decoder["mask_token"], tokens)
    at = np.array([[0, 1, 0, 1], [np.sin(1), np.cos(1), 0, 1]])
    columns, rows = at[[0, 1, 0, 1], :2], at[[0, 0, 1, 1], :2]
    tokens = norm(tokens + np.concatenate([columns, rows], 1), decoder["norm"])
    predicted = linear(tokens, decoder["output"])
    target = x
    if normalize:
        squares = ((x - x.mean(-1, keepdims=True)) ** 2).sum(-1, keepdims=True)
        target = (x - x.mean(-1, keepdims=True)) / np.sqrt(squares / 3 + 1e-6)
    errors = ((predicted - target) ** 2).mean(-1)
    by_hand = (errors[0][masked[0]].mean() + errors[2][masked[2]].mean()) / 2
    np.testing.assert_allclose(found, by_hand, rtol=1e-5)
    assert terms == {"loss": found}


def test_the_loss_falls_far_on_one_batch(mae, one_device):
    cfg = dataclasses.replace(
        mae,
        batch_size=4,
        epochs=50,  # 800 steps, each with another mask
        objective=dataclasses.replace(mae.objective, mask_ratio=0.5),
        optim=OptimConfig(lr=3e-3, weight_decay=0.0, warmup_epochs=2, b2=0.98),
    )
    built = train_step.build(cfg, one_device)
    state, batch, found = built.init(jax.random.key(0)), make_batch(cfg), []
    for _ in range(cfg.total_steps):
        state, metrics = built.step(state, batch, {})
        found.append(float(metrics["loss"]))
    # 15/16 is the error of predicting each patch's mean; the images are noise.
    assert found[0] > 0.9 and np.mean(found[-20:]) < 0.4, (found[0], found[-20:])


def test_masked_pixels_reach_no_prediction_and_kept_patches_no_loss(mae, monkeypatch):
    model = MAE(mae, rngs=nnx.Rngs(0))
    batch, key = make_batch(mae), jax.random.key(0)
    images = pixels(batch.views[0])
    mask = model.mask(key, batch.id)
    assert mask.masked.sum(1).tolist() == [19] * len(images)  # of 25
    noise = jax.random.normal(key, images.shape)
    hidden = visualize.twin(model, images, mask, patchify(noise, mae.model.patch))
    assert float(jnp.abs(hidden - images).max()) > 1
    predicted = model.predict(images, mask)
    assert (predicted == model.predict(hidden, mask)).all()

    monkeypatch.setattr(MAE, "mask", lambda self, key, ids: mask)
    hidden = model.decoder(model.encoded(images, mask), mask)
    assert hidden.shape == (len(images), 19, 16)
    rows = jnp.take_along_axis(predicted, mask.hidden[..., None], axis=1)
    np.testing.assert_allclose(hidden, rows, atol=1e-6)
    monkeypatch.setattr(Decoder, "__call__", lambda *_: hidden)  # the encoder sees kept patches
    other = make_batch(mae, seed=1).views[0]
    losses = []
    for where in (jnp.zeros_like(mask.masked), ~mask.masked, mask.masked):
        where = jnp.broadcast_to(where[..., None], (*where.shape, 16))
        where = unpatchify(where, mae.model.patch, model.encoder.side)
        view = jnp.where(where, other, batch.views[0])
        losses.append(float(model.loss(dataclasses.replace(batch, views=(view,)), key)[0]))
    assert losses[0] == losses[1] != losses[2]


def saved(cfg: Config, mesh, workdir) -> str:
    """The --workdir of a run of `cfg` that has not begun to learn."""
    state = train_step.build(cfg, mesh).init(jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(workdir, cfg.checkpoint)
    checkpoints.save(state, cfg, checkpoint.BEGIN)
    checkpoints.close()
    return str(workdir)


@pytest.mark.parametrize("which", ["mae", "raw", "cmae", "pixels"])
def test_the_picture_has_the_predictions_in_the_masked_places(mae, one_device, tmp_path, which):
    """As they are without normalised targets; else with the true patch's mean and deviation."""
    objective = {
        "mae": mae.objective,
        "raw": dataclasses.replace(mae.objective, normalize_patches=False),
        "cmae": CMAEConfig(decoder=DECODER),
        "pixels": dataclasses.replace(
            Config().objective, mask_ratio=0.75, decoder=DECODER, target=PixelsConfig()
        ),
    }[which]
    cfg = dataclasses.replace(mae, objective=objective)
    restored = visualize.restore(Checkpoint.open(saved(cfg, one_device, tmp_path)))
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 20, 1), np.uint8)
    rows = visualize.panels(restored, images, jax.random.key(1))
    assert list(rows) == ["image", "masked", "reconstruction"]
    assert len(visualize.draw(rows)) > 3000

    mask = restored.objective.mask(jax.random.key(1), jnp.arange(3))
    image, twin, shown = (np.asarray(patchify(row, 4), np.float64) for row in rows.values())
    hidden = np.asarray(mask.masked)
    assert hidden.sum() == 3 * 19 and (twin[hidden] == 0).all()
    assert (twin[~hidden] == image[~hidden]).all() and (shown[~hidden] == image[~hidden]).all()
    predicted = np.asarray(restored.objective.predict(pixels(images), mask), np.float64)
    if which != "raw":
        deviation = image.std(-1, ddof=1, keepdims=True)
        predicted = predicted * deviation + image.mean(-1, keepdims=True)
    np.testing.assert_allclose(shown[hidden], np.clip(predicted, -1, 1)[hidden], atol=1e-5)


def test_the_picture_of_cmae_is_that_of_its_own_network(mae, one_device, tmp_path):
    """Though only encoder and decoder are restored, and not its moving variables."""
    cfg = dataclasses.replace(mae, objective=CMAEConfig(decoder=DECODER))
    built = train_step.build(cfg, one_device)
    state = built.init(jax.random.key(0))
    assert state.moving
    whole = nnx.merge(built.graph, state.params, state.moving, {})
    found = visualize.restore(Checkpoint.open(saved(cfg, one_device, tmp_path))).objective
    assert isinstance(whole, CMAE) and not isinstance(found, CMAE)
    images = pixels(make_batch(cfg).views[0])
    mask = masking.sample("random", 0.75, 5, jax.random.key(0), jnp.arange(len(images)))
    assert (found.predict(images, mask) == whole.predict(images, mask)).all()


def test_a_run_that_masks_nothing_has_no_picture(supervised, one_device, tmp_path):
    location = saved(supervised, one_device, tmp_path)
    with pytest.raises(SetupError, match="is of objective 'supervised', which hides no patches"):
        visualize.restore(Checkpoint.open(location))
