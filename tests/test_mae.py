"""MAE: on one batch, what it may not see, and what its picture shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, save_initial, train_on
from flax import nnx

from supmim_jax import visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    CMAEConfig,
    Config,
    DecoderConfig,
    MAEConfig,
    OptimConfig,
    PixelsConfig,
    SupMIMConfig,
    changed,
)
from supmim_jax.errors import SetupError
from supmim_jax.models import masking
from supmim_jax.models.decoder import Decoder
from supmim_jax.models.vit import patchify, pixels, unpatchify
from supmim_jax.objectives.cmae import CMAE
from supmim_jax.objectives.mae import MAE
from supmim_jax.train_step import TrainStep

DECODER = DecoderConfig(width=32, mlp_dim=64, heads=2)


@pytest.fixture
def mae(cfg) -> Config:
    """MAE with a CLS token on the images of `cfg`."""
    model = {"pooling": "cls", "positions": "sincos2d", "drop_path": 0.0}
    return changed(cfg, model=model, objective=MAEConfig(decoder=DECODER))


def test_the_loss_falls_far_on_one_batch(mae, one_device):
    optim = OptimConfig(lr=3e-3, weight_decay=0.0, warmup_epochs=2, b2=0.98)
    # 800 steps, each with another mask.
    cfg = changed(mae, batch_size=4, epochs=50, objective={"mask_ratio": 0.5}, optim=optim)
    _, metrics = train_on(cfg, one_device, [make_batch(cfg)] * cfg.total_steps)
    found = [x["loss"] for x in metrics]
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
        losses.append(float(model.loss(batch.replace(views=(view,)), key)[0]))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("which", ["mae", "raw", "cmae", "pixels"])
def test_the_picture_has_the_predictions_in_the_masked_places(mae, tmp_path, which):
    """As they are without normalised targets; else with the true patch's mean and deviation."""
    objective = {
        "mae": mae.objective,
        "raw": changed(mae.objective, normalize_patches=False),
        "cmae": CMAEConfig(decoder=DECODER),
        "pixels": SupMIMConfig(mask_ratio=0.75, decoder=DECODER, target=PixelsConfig()),
    }[which]
    cfg = changed(mae, objective=objective)
    restored = visualize.restore(Checkpoint.open(save_initial(cfg, tmp_path)))
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
    cfg = changed(mae, objective=CMAEConfig(decoder=DECODER))
    built = TrainStep.build(cfg, one_device)
    state = built.init(jax.random.key(0))
    assert state.moving
    whole = nnx.merge(built.graph, state.params, state.moving, {})
    found = visualize.restore(Checkpoint.open(save_initial(cfg, tmp_path))).objective
    assert isinstance(whole, CMAE) and not isinstance(found, CMAE)
    images = pixels(make_batch(cfg).views[0])
    mask = masking.sample("random", 0.75, 5, jax.random.key(0), jnp.arange(len(images)))
    predictions = [jax.jit(x.predict)(images, mask) for x in (found, whole)]
    assert (predictions[0] == predictions[1]).all()


def test_a_run_that_masks_nothing_has_no_picture(supervised, tmp_path):
    with pytest.raises(SetupError, match="'supervised', which hides no patches"):
        visualize.restore(Checkpoint.open(save_initial(supervised, tmp_path)))
