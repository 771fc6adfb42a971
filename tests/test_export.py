"""What is exported computes the same elsewhere, and what is imported computes it here.

transformers is an independent implementation; of timm's ViT the forward pass is written out here
in PyTorch, and test_export_timm.py runs timm itself where it is installed.
"""

import dataclasses

import numpy as np
import pytest
from conftest import make_features, make_params

from supmim_jax import export, import_weights
from supmim_jax.config import DataConfig, MAEConfig
from supmim_jax.formats import files, timm

EXTRA = 'exports are tested against PyTorch: pip install -e ".[parity]"'
torch = pytest.importorskip("torch", reason=EXTRA)
hf = pytest.importorskip("transformers", minversion="5.9", reason=EXTRA)

MODELS = [  # and channels; each value meets each of the others
    (dict(pooling=pooling, positions=positions, layer_scale=scale, gelu=gelu), channels)
    for pooling in ("gap", "cls")
    for positions, scale, gelu, channels in (
        ("learned", 0.0, "exact", 1),
        ("sincos2d", 0.1, "exact", 3),
        ("learned", 0.1, "tanh", 3),
        ("sincos2d", 0.0, "tanh", 1),
    )
]


def make(supervised, model: dict, channels: int):
    """A config of this model on 20-pixel images, random parameters, and images."""
    model = dataclasses.replace(supervised.model, **model)
    data = dataclasses.replace(supervised.data, channels=channels, num_classes=7)
    cfg = dataclasses.replace(supervised, model=model, data=data)
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 20, channels), np.uint8)
    return cfg, make_params(cfg), images


def pixels(images):
    """The images as PyTorch models see them after their processor."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("model", "channels"), MODELS)
def test_transformers_computes_the_same(supervised, tmp_path, model, channels):
    cfg, params, images = make(supervised, model, channels)
    files.write(tmp_path / "out", *export.WRITERS["transformers"](params, cfg))
    load = hf.AutoModelForImageClassification.from_pretrained
    theirs, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert type(theirs).__name__.startswith({"cls": "ViT", "gap": "IJepa"}[cfg.model.pooling])
    ours = make_features(cfg, params, images)
    assert_close(ours.logits, theirs(pixels(images)).logits)

    encoder = hf.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    tokens = encoder(pixels(images)).last_hidden_state
    assert_close(ours.pooled, tokens[:, 0] if cfg.model.pooling == "cls" else tokens.mean(1))
    assert_close(np.reshape(ours.tokens, (3, 25, -1)), tokens[:, -25:])


@pytest.mark.parametrize(("model", "channels"), MODELS)
def test_transformers_loads_an_encoder_by_itself(supervised, tmp_path, model, channels):
    headless = dataclasses.replace(supervised, objective=MAEConfig())
    cfg, params, images = make(headless, model, channels)
    files.write(tmp_path / "out", *export.WRITERS["transformers"](params, cfg))
    cls = cfg.model.pooling == "cls"
    for kind in (hf.AutoModel, hf.ViTModel if cls else hf.IJepaModel):
        theirs, report = kind.from_pretrained(
            tmp_path / "out", add_pooling_layer=False, output_loading_info=True
        )
        assert not any(report.values()), report
    ours = make_features(cfg, params, images)
    tokens = theirs(pixels(images)).last_hidden_state
    assert ours.logits is None
    assert_close(ours.pooled, tokens[:, 0] if cls else tokens.mean(1))
    assert_close(np.reshape(ours.tokens, (3, 25, -1)), tokens[:, -25:])


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_of_transformers_makes_our_pixels(supervised, tmp_path, channels):
    cfg, params, _ = make(supervised, {}, channels)
    data = dataclasses.replace(cfg.data, eval_resize=30)
    cfg = dataclasses.replace(cfg, data=data)
    files.write(tmp_path / "out", *export.WRITERS["transformers"](params, cfg))
    processor = hf.AutoImageProcessor.from_pretrained(tmp_path / "out")
    image = np.random.default_rng(0).integers(0, 256, (30, 40, channels), np.uint8)
    found = processor(image, return_tensors="pt", input_data_format="channels_last")
    assert_close(pixels(image[None, 5:25, 10:30].copy()), found["pixel_values"])


def timm_features(state, args, x):
    """timm's VisionTransformer in evaluation: tokens after its norm, and logits."""
    functional = torch.nn.functional
    width, heads = args["embed_dim"], args["num_heads"]
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}[args["act_layer"]]

    def linear(name, x):
        return functional.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name, x):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        return functional.layer_norm(x, (width,), weight, bias, 1e-6)

    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    x = functional.conv2d(x, weight, bias, stride=args["patch_size"]).flatten(2).transpose(1, 2)
    x = x + state["pos_embed"]
    if args["class_token"]:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    for i in range(args["depth"]):
        ls1, ls2 = (state.get(f"blocks.{i}.ls{n}.gamma", torch.ones(width)) for n in (1, 2))
        qkv = linear(f"blocks.{i}.attn.qkv", norm(f"blocks.{i}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.mT / (width // heads) ** 0.5, -1)
        mixed = (weights @ v).transpose(1, 2).flatten(2)
        x = x + ls1 * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = linear(f"blocks.{i}.mlp.fc1", norm(f"blocks.{i}.norm2", x))
        hidden = functional.gelu(hidden, approximate=approximate)
        x = x + ls2 * linear(f"blocks.{i}.mlp.fc2", hidden)
    x = norm("norm", x)
    pooled = {"token": x[:, 0], "avg": x.mean(1)}[args["global_pool"]]
    return x, pooled, linear("head", pooled)


@pytest.mark.parametrize(("model", "channels"), MODELS)
def test_the_same_in_pytorch_under_the_names_of_timm(supervised, model, channels):
    cfg, params, images = make(supervised, model, channels)
    tensors, documents = timm.write(params, cfg)
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    arguments = documents["config.json"]["model_args"]
    tokens, pooled, logits = timm_features(state, arguments, pixels(images))
    ours = make_features(cfg, params, images)
    assert_close(ours.logits, logits)
    assert_close(ours.pooled, pooled)
    assert_close(np.reshape(ours.tokens, (3, 25, -1)), tokens[:, -25:])


def published(weights, heads):
    """The arrays of an AugReg .npz from those of ViTForImageClassification, by flax's rules."""

    def dense(name):
        return weights[f"{name}.weight"].T, weights[f"{name}.bias"]

    arrays = {
        "cls": weights["vit.embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": weights["vit.embeddings.position_embeddings"],
        "embedding/kernel": np.transpose(
            weights["vit.embeddings.patch_embeddings.projection.weight"], (2, 3, 1, 0)
        ),
        "embedding/bias": weights["vit.embeddings.patch_embeddings.projection.bias"],
        "Transformer/encoder_norm/scale": weights["vit.layernorm.weight"],
        "Transformer/encoder_norm/bias": weights["vit.layernorm.bias"],
    }
    arrays["head/kernel"], arrays["head/bias"] = dense("classifier")
    for i in range(2):
        block, layer = f"Transformer/encoderblock_{i}", f"vit.layers.{i}"
        for theirs, name in (("LayerNorm_0", "before"), ("LayerNorm_2", "after")):
            for kind, part in (("scale", "weight"), ("bias", "bias")):
                arrays[f"{block}/{theirs}/{kind}"] = weights[f"{layer}.layernorm_{name}.{part}"]
        for theirs, name in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
            dense_name = f"{block}/MlpBlock_3/{theirs}"
            arrays[f"{dense_name}/kernel"], arrays[f"{dense_name}/bias"] = dense(
                f"{layer}.mlp.{name}"
            )
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for theirs, name in (("query", "q"), ("key", "k"), ("value", "v")):
            kernel, bias = dense(f"{layer}.attention.{name}_proj")
            arrays[f"{attention}/{theirs}/kernel"] = kernel.reshape(len(kernel), heads, -1)
            arrays[f"{attention}/{theirs}/bias"] = bias.reshape(heads, -1)
        kernel, bias = dense(f"{layer}.attention.o_proj")
        arrays[f"{attention}/out/kernel"] = kernel.reshape(heads, -1, kernel.shape[1])
        arrays[f"{attention}/out/bias"] = bias
    return arrays


def test_augreg_computes_here_what_it_computes_in_transformers(supervised, tmp_path):
    size = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=56, num_attention_heads=4)
    config = hf.ViTConfig(
        **size, image_size=24, patch_size=8, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"
    )
    config.num_labels = 5
    model = hf.ViTForImageClassification(config).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.3
        parameter.data = noise + (1.0 if parameter.ndim == 1 else 0.0)
    weights = {name: x.numpy() for name, x in model.state_dict().items()}
    np.savez(tmp_path / "vit.npz", **published(weights, 4))

    cfg, params, _ = import_weights.load("augreg", tmp_path / "vit.npz", supervised)
    assert cfg.model == dataclasses.replace(
        cfg.model, patch=8, width=32, depth=2, mlp_dim=56, heads=4, pooling="cls", gelu="tanh"
    )
    assert (cfg.data.image_size, cfg.data.num_classes, cfg.data.channels) == (24, 5, 3)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    assert isinstance(cfg.data, DataConfig) and cfg.data.eval_resize == 27
    assert_close(make_features(cfg, params, images).logits, model(pixels(images)).logits)


@pytest.mark.parametrize("pooling", ["cls", "gap"])
def test_a_model_saved_by_transformers_is_read(supervised, tmp_path, pooling):
    """With its own position for the CLS token, which our CLS token takes in."""
    config, model = {
        "cls": (hf.ViTConfig, hf.ViTForImageClassification),
        "gap": (hf.IJepaConfig, hf.IJepaForImageClassification),
    }[pooling]
    size = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=56, num_attention_heads=4)
    torch.manual_seed(0)
    model = model(config(**size, image_size=24, patch_size=8, layer_norm_eps=1e-6)).eval()
    model.save_pretrained(tmp_path / "saved")
    cfg, params, _ = import_weights.load("transformers", tmp_path / "saved", supervised)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    assert (cfg.model.pooling, cfg.data.num_classes, cfg.data.eval_resize) == (pooling, 2, 24)
    assert_close(make_features(cfg, params, images).logits, model(pixels(images)).logits)
