"""What is exported computes the same elsewhere.

transformers is an independent implementation; of timm's ViT the forward pass is written out here
in PyTorch, and test_export_timm.py runs timm itself where it is installed.
"""

import dataclasses

import numpy as np
import pytest
from conftest import make_features, make_params

from supmim_jax import export
from supmim_jax.config import MAEConfig, changed
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
    cfg = changed(supervised, model=model, data={"channels": channels, "num_classes": 7})
    images = np.random.default_rng(1).integers(0, 256, (3, 20, 20, channels), np.uint8)
    return cfg, make_params(cfg), images


def pixels(images):
    """The images as PyTorch models see them after their processor."""
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def assert_close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=1e-5)


def patches(tokens):
    """The last 25 tokens on their grid, behind what else there is."""
    return tokens[:, -25:].unflatten(1, (5, 5))


@pytest.mark.parametrize(("model", "channels"), MODELS)
def test_transformers_computes_the_same(supervised, tmp_path, model, channels):
    cfg, params, images = make(supervised, model, channels)
    files.write(tmp_path / "out", *export.WRITERS["transformers"](params, cfg))
    load = hf.AutoModelForImageClassification.from_pretrained
    theirs, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    cls = cfg.model.pooling == "cls"
    assert type(theirs).__name__.startswith("ViT" if cls else "IJepa")
    ours = make_features(cfg, params, images)
    assert_close(ours.logits, theirs(pixels(images)).logits)
    encoder = hf.AutoModel.from_pretrained(tmp_path / "out", add_pooling_layer=False)
    tokens = encoder(pixels(images)).last_hidden_state
    assert_close(ours.pooled, tokens[:, 0] if cls else tokens.mean(1))
    assert_close(ours.tokens, patches(tokens))


@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_transformers_loads_an_encoder_by_itself(supervised, tmp_path, pooling):
    headless = dataclasses.replace(supervised, objective=MAEConfig())
    cfg, params, images = make(headless, {"pooling": pooling}, 3)
    files.write(tmp_path / "out", *export.WRITERS["transformers"](params, cfg))
    for kind in (hf.AutoModel, hf.ViTModel if pooling == "cls" else hf.IJepaModel):
        theirs, report = kind.from_pretrained(
            tmp_path / "out", add_pooling_layer=False, output_loading_info=True
        )
        assert not any(report.values()), report
    ours = make_features(cfg, params, images)
    tokens = theirs(pixels(images)).last_hidden_state
    assert ours.logits is None
    assert_close(ours.pooled, tokens[:, 0] if pooling == "cls" else tokens.mean(1))
    assert_close(ours.tokens, patches(tokens))


@pytest.mark.parametrize("channels", [1, 3])
def test_the_processor_of_transformers_makes_our_pixels(supervised, tmp_path, channels):
    cfg, params, _ = make(changed(supervised, data={"eval_resize": 30}), {}, channels)
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
    x = functional.conv2d(x, weight, bias, stride=args["patch_size"]).flatten(2).mT
    x = x + state["pos_embed"]
    if args["class_token"]:
        x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x], 1)
    for block in (f"blocks.{i}" for i in range(args["depth"])):
        ls1, ls2 = (state.get(f"{block}.ls{i}.gamma", torch.ones(width)) for i in (1, 2))
        qkv = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + ls1 * linear(f"{block}.attn.proj", mixed)
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x))
        x = x + ls2 * linear(f"{block}.mlp.fc2", functional.gelu(hidden, approximate=approximate))
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
    assert_close(ours.tokens, patches(tokens))
