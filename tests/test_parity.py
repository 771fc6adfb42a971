"""Encoder, masking, decoder and objective `mae` compute what Hugging Face's do.

The weights are the same and random; test_export.py compares whole encoders and classifiers. A
missing key bias cannot show: it shifts all scores of a query alike, and softmax ignores it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from supmim_jax import init_from
from supmim_jax.batch import Batch
from supmim_jax.config import Config, DataConfig, DecoderConfig, MAEConfig, ViTConfig
from supmim_jax.models import masking
from supmim_jax.models.transformer import sincos2d
from supmim_jax.models.vit import ViT, patchify, unpatchify
from supmim_jax.objectives.mae import MAE

EXTRA = 'parity is tested against PyTorch: pip install -e ".[parity]"'
torch = pytest.importorskip("torch", reason=EXTRA)
hf = pytest.importorskip("transformers", minversion="5.9", reason=EXTRA)  # before: other names
hf_mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae", reason=EXTRA)

PATCH, SIDE, BATCH, RATIO = 8, 6, 3, 0.75
SIZE = PATCH * SIDE
DATA = DataConfig(image_size=SIZE, eval_resize=SIZE, channels=3, num_classes=7)
MODEL = dict(patch=PATCH, width=32, depth=3, mlp_dim=56, heads=4)
HF_MODEL = dict(
    image_size=SIZE,
    patch_size=PATCH,
    hidden_size=32,
    num_hidden_layers=3,
    intermediate_size=56,
    num_attention_heads=4,
    layer_norm_eps=1e-6,  # ours and the original ViT's; HF's default is 1e-12
)
DECODER = DecoderConfig(width=24, depth=2, mlp_dim=40, heads=2)
MAE_RUN = Config(
    batch_size=BATCH,
    data=DATA,
    model=ViTConfig(**MODEL, pooling="cls", positions="sincos2d"),
    objective=MAEConfig(mask_ratio=RATIO, decoder=DECODER),
)
HF_DECODER = dict(
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_intermediate_size=40,
    decoder_num_attention_heads=2,
)
BLOCK = {
    "norm1": ["layernorm_before"],
    "qkv": ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
    "out": ["attention.o_proj"],
    "norm2": ["layernorm_after"],
    "fc1": ["mlp.fc1"],
    "fc2": ["mlp.fc2"],
}


@pytest.fixture(autouse=True)
def full_precision():
    """Accelerators multiply float32 matrices in fewer bits unless told otherwise."""
    with jax.default_matmul_precision("highest"):
        yield


def randomize(model):
    """The model and its weights as arrays, random in biases, norms and tokens too.

    Embeddings are small, as at the start of training, so that the LayerNorms' epsilon shows;
    activations are of order 1. MAE's positions, which aren't trained, stay as they are.
    """
    rng = np.random.default_rng(0)
    for name, parameter in model.eval().named_parameters():
        if not parameter.requires_grad:
            continue
        value = rng.normal(size=parameter.shape)
        if parameter.ndim in (2, 4):  # linear layer, convolution
            value /= np.sqrt(np.prod(parameter.shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.3 * value
        else:
            value *= 0.3
        if "embeddings." in name and "mask_token" not in name:
            value *= 0.02
        parameter.data.copy_(torch.from_numpy(value))
    return model, {name: x.numpy() for name, x in model.state_dict().items()}


def random_images():
    """The same float images for us (BxHxWxC) and for PyTorch (BxCxHxW)."""
    x = np.random.default_rng(1).normal(size=(BATCH, SIZE, SIZE, 3)).astype(np.float32)
    return x, torch.from_numpy(x).permute(0, 3, 1, 2)


def port_layer(weights, *names):
    """Our linear layer or LayerNorm from PyTorch's; several are joined along the outputs."""
    weight, bias = (
        np.concatenate([weights[f"{name}.{part}"] for name in names]) for part in ("weight", "bias")
    )
    if weight.ndim == 1:
        return {"scale": weight, "bias": bias}
    if weight.ndim == 4:  # a convolution: channel, row, column -> row, column, channel
        weight = weight.transpose(0, 2, 3, 1).reshape(len(weight), -1)
    return {"kernel": weight.T, "bias": bias}


def port(weights, layers, stack, depth):
    """Our parameters from HF's: layers {our name: HF's}, and `depth` blocks under `stack`."""
    blocks = [
        {k: port_layer(weights, *(f"{stack}.{i}.{n}" for n in names)) for k, names in BLOCK.items()}
        for i in range(depth)
    ]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
    params = {ours: port_layer(weights, theirs) for ours, theirs in layers.items()}
    return params | {"transformer": {"blocks": stacked}}


def port_encoder(weights, cfg, root=""):
    """Parameters of ViT; HF has a position for CLS, which is part of our CLS token."""
    embeddings = f"{root}embeddings"
    layers = {"patches": f"{embeddings}.patch_embeddings.projection", "norm": f"{root}layernorm"}
    params = port(weights, layers, f"{root}layers", cfg.depth)
    positions = weights[f"{embeddings}.position_embeddings"][0]
    if cfg.positions == "learned":
        params["positions"] = positions[1:]
    return params | {"cls": weights[f"{embeddings}.cls_token"][0, 0] + positions[0]}


def port_decoder(weights):
    """Parameters of Decoder from those of ViTMAEForPreTraining."""
    layers = {"embed": "embed", "norm": "norm", "output": "pred"}
    layers = {ours: f"decoder.decoder_{theirs}" for ours, theirs in layers.items()}
    params = port(weights, layers, "decoder.decoder_layers", DECODER.depth)
    return params | {"mask_token": weights["decoder.mask_token"][0, 0]}


def load(params, make, *args, **kw):
    """The module built with these arguments and parameters, which must be all that it has."""
    graph, own = jax.eval_shape(lambda: nnx.split(make(*args, **kw, rngs=nnx.Rngs(0)), nnx.Param))
    assert jax.tree.map(np.shape, nnx.to_pure_dict(own)) == jax.tree.map(np.shape, params)
    return nnx.merge(graph, jax.tree.map(jnp.asarray, params))


def assert_close(ours, theirs, atol=1e-5):
    if isinstance(theirs, torch.Tensor):
        theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("ours, theirs", [("exact", "gelu"), ("tanh", "gelu_pytorch_tanh")])
def test_tokens_of_an_image_and_of_its_masked_twin(ours, theirs):
    cfg = ViTConfig(**MODEL, pooling="cls", gelu=ours)
    config = hf.ViTConfig(**HF_MODEL, hidden_act=theirs)
    model = hf.ViTModel(config, add_pooling_layer=False, use_mask_token=True)
    model, weights = randomize(model)
    vit = load(port_encoder(weights, cfg), ViT, cfg, DATA)
    x, pixels = random_images()
    mask = masking.sample("block", 0.5, SIDE, jax.random.key(0), jnp.arange(BATCH))
    masked = vit.embed(x, masked=(mask, weights["embeddings.mask_token"][0, 0]))
    hidden = torch.from_numpy(np.array(mask.masked))

    expected = model(pixels).last_hidden_state
    assert_close(vit.encode((vit.embed(x),))[0], expected)
    packed = vit.encode((vit.embed(x), masked))
    assert_close(packed[0], expected)
    assert_close(packed[1], model(pixels, bool_masked_pos=hidden).last_hidden_state)


@pytest.mark.parametrize("side, ratio", [(6, 0.75), (6, 0.6), (5, 0.5), (7, 0.3), (4, 0.9)])
def test_masks_from_the_same_noise(side, ratio):
    config = hf.ViTMAEConfig(image_size=side * PATCH, patch_size=PATCH, mask_ratio=ratio)
    noise = torch.rand((BATCH, side**2), generator=torch.Generator().manual_seed(2))
    ids = torch.arange(side**2).expand(BATCH, -1)[..., None]
    keep, masked, restore = hf_mae.ViTMAEEmbeddings(config).random_masking(ids, noise)
    mask = masking.from_scores(noise.numpy(), ratio)
    np.testing.assert_array_equal(mask.keep, keep[..., 0].numpy())
    np.testing.assert_array_equal(mask.restore, restore.numpy())
    np.testing.assert_array_equal(mask.masked, masked.numpy() == 1)


def mae(normalize: bool):
    """HF's model with random weights and the positions that it starts from, and its weights."""
    config = hf.ViTMAEConfig(**HF_MODEL, **HF_DECODER, mask_ratio=RATIO, norm_pix_loss=normalize)
    model, weights = randomize(hf.ViTMAEForPreTraining(config))
    embeddings, decoder = hf_mae.ViTMAEEmbeddings(config), hf_mae.ViTMAEDecoder(config, SIDE**2)
    embeddings.initialize_weights()  # within the whole model, HF 5.23 leaves both positions zero
    model.vit.embeddings.position_embeddings.data = embeddings.position_embeddings.data
    model.decoder.decoder_pos_embed.data = decoder.decoder_pos_embed.data
    return model, weights


def port_mae(weights):
    """Parameters of objective `mae` from those of ViTMAEForPreTraining."""
    return {
        "encoder": port_encoder(weights, MAE_RUN.model, "vit."),
        "decoder": port_decoder(weights),
    }


def test_mae_positions_and_pixel_order():
    model, _ = mae(True)
    for theirs in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        assert_close(sincos2d(SIDE, SIDE, theirs.shape[-1]), theirs[0, 1:], atol=1e-6)
        assert not theirs[0, 0].any()  # that of the CLS token, which ours does without
    x, pixels = random_images()
    assert_close(patchify(x, PATCH), model.patchify(pixels), atol=0)
    assert_close(unpatchify(patchify(x, PATCH), PATCH, SIDE), x, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_tokens_predictions_loss_and_every_gradient(monkeypatch, normalize):
    """Images, noise and weights are the same; all else is each side's own."""
    model, weights = mae(normalize)
    objective = dataclasses.replace(MAE_RUN.objective, normalize_patches=normalize)
    ours = load(port_mae(weights), MAE, dataclasses.replace(MAE_RUN, objective=objective))
    images = np.random.default_rng(1).integers(0, 256, (BATCH, SIZE, SIZE, 3), dtype=np.uint8)
    noise = torch.rand((BATCH, SIDE**2), generator=torch.Generator().manual_seed(3))
    mask = masking.from_scores(noise.numpy(), RATIO)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    expected = model(pixels, noise=noise)
    x = jnp.asarray(images / 127.5 - 1, jnp.float32)
    assert_close(ours.encoded(x, mask), model.vit(pixels, noise=noise).last_hidden_state)
    assert_close(ours.predict(x, mask), expected.logits)

    monkeypatch.setattr(MAE, "mask", lambda self, key, ids: mask)
    ids = jnp.arange(BATCH)
    batch = Batch((jnp.asarray(images),), ids, jnp.ones(BATCH), ids)
    loss = nnx.value_and_grad(lambda module: module.loss(batch, jax.random.key(0)), has_aux=True)
    (found, terms), gradients = loss(ours)
    expected.loss.backward()
    np.testing.assert_allclose(float(found), expected.loss.item(), rtol=1e-5)
    assert terms.keys() == {"loss"} and terms["loss"] == found
    theirs = {
        name: np.zeros(p.shape) if p.grad is None else p.grad.numpy()  # None: fixed positions
        for name, p in model.named_parameters()
    }
    gradients = nnx.to_pure_dict(gradients)
    jax.tree_util.tree_map_with_path(assert_same, gradients, port_mae(theirs))


def assert_same(path, ours, theirs) -> None:
    """The gradients of a parameter, in each block by itself, differ by 1e-4 of their norm."""
    stacked = any(key.key == "blocks" for key in path)
    for a, b in zip(ours, theirs, strict=True) if stacked else [(ours, theirs)]:
        norm = np.linalg.norm(b)
        assert norm > 0 and np.linalg.norm(a - b) < 1e-4 * norm, (path, np.linalg.norm(a - b), norm)


@pytest.mark.parametrize("side", [10, 16, 24])
def test_positions_are_resized_as_timm_does(side):
    """resample_abs_pos_embed: PyTorch's bicubic, antialiased."""
    grid = torch.randn((1, 8, 14, 14), generator=torch.Generator().manual_seed(0))
    theirs = torch.nn.functional.interpolate(
        grid, size=(side, side), mode="bicubic", antialias=True
    )
    ours = init_from.resized(jnp.asarray(grid[0].permute(1, 2, 0).reshape(196, 8).numpy()), side)
    np.testing.assert_allclose(ours, theirs[0].permute(1, 2, 0).reshape(-1, 8), atol=3e-6)
