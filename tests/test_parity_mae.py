"""Objective `mae` has the loss and the gradients of Hugging Face's, given the same weights.

The uint8 images, the noise that draws the mask and the weights are the same; all else is each
side's own, down to the sum over the masked patches.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_parity import (
    BATCH,
    DATA,
    DECODER,
    EXTRA,
    HF_DECODER,
    HF_MODEL,
    MODEL,
    RATIO,
    SIDE,
    SIZE,
    assert_close,
    full_precision,  # noqa: F401 a fixture
    load,
    port_decoder,
    port_encoder,
    randomize,
)

from supmim_jax.batch import Batch
from supmim_jax.config import Config, MAEConfig, ViTConfig
from supmim_jax.models import masking
from supmim_jax.models.transformer import sincos2d
from supmim_jax.objectives.mae import MAE

torch = pytest.importorskip("torch", reason=EXTRA)
hf = pytest.importorskip("transformers", minversion="5.9", reason=EXTRA)
hf_mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae", reason=EXTRA)

CFG = Config(
    batch_size=BATCH,
    data=DATA,
    model=ViTConfig(**MODEL, pooling="cls", positions="sincos2d"),
    objective=MAEConfig(mask_ratio=RATIO, decoder=DECODER),
)


def theirs(normalize: bool):
    """HF's model with random weights and the positions that it starts from, and its weights."""
    config = hf.ViTMAEConfig(**HF_MODEL, **HF_DECODER, mask_ratio=RATIO, norm_pix_loss=normalize)
    model, weights = randomize(hf.ViTMAEForPreTraining(config))
    embeddings, decoder = hf_mae.ViTMAEEmbeddings(config), hf_mae.ViTMAEDecoder(config, SIDE**2)
    embeddings.initialize_weights()
    model.vit.embeddings.position_embeddings.data = embeddings.position_embeddings.data
    model.decoder.decoder_pos_embed.data = decoder.decoder_pos_embed.data
    return model, weights


@pytest.mark.parametrize("normalize", [True, False])
def test_the_loss_and_every_gradient(monkeypatch, normalize):
    model, weights = theirs(normalize)
    objective = dataclasses.replace(CFG.objective, normalize_patches=normalize)
    params = {"encoder": port_encoder(weights, CFG.model, "vit."), "decoder": port_decoder(weights)}
    ours = load(params, MAE, dataclasses.replace(CFG, objective=objective))

    images = np.random.default_rng(1).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    noise = torch.rand((BATCH, SIDE**2), generator=torch.Generator().manual_seed(3))
    mask = masking.from_scores(noise.numpy(), RATIO)
    monkeypatch.setattr(MAE, "mask", lambda self, key, ids: mask)
    ids = jnp.arange(BATCH)
    batch = Batch((jnp.asarray(images),), ids, jnp.ones(BATCH), ids)
    loss = nnx.value_and_grad(lambda module: module.loss(batch, jax.random.key(0)), has_aux=True)
    (found, terms), gradients = loss(ours)

    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = model(pixels, noise=noise).loss
    expected.backward()
    np.testing.assert_allclose(float(found), expected.item(), rtol=1e-5)
    assert terms.keys() == {"loss"} and terms["loss"] == found
    theirs_by_name = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy()  # None: fixed positions
        for name, p in model.named_parameters()
    }
    wanted = {
        "encoder": port_encoder(theirs_by_name, CFG.model, "vit."),
        "decoder": port_decoder(theirs_by_name),
    }
    jax.tree_util.tree_map_with_path(assert_same, nnx.to_pure_dict(gradients), wanted)


def assert_same(path, ours, theirs) -> None:
    """The gradients of a parameter, in each block by itself, differ by 1e-4 of their norm."""
    stacked = any(key.key == "blocks" for key in path)
    for a, b in zip(ours, theirs, strict=True) if stacked else [(ours, theirs)]:
        norm = np.linalg.norm(b)
        assert norm > 0 and np.linalg.norm(a - b) < 1e-4 * norm, (path, np.linalg.norm(a - b), norm)


def test_the_fixed_positions_of_encoder_and_decoder():
    model, _ = theirs(True)
    for found in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert_close(sincos2d(SIDE, SIDE, found.shape[-1]), found[0, 1:], atol=1e-6)
        assert not found[0, 0].any()  # that of the CLS token, which ours does without
