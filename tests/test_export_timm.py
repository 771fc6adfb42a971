"""timm itself loads what is exported, computes the same, and what it saves is read."""

import dataclasses

import numpy as np
import pytest
from conftest import make_features
from test_export import MODELS, assert_close, make, patches, pixels

import supmim_jax
from supmim_jax import export, import_weights
from supmim_jax.config import MAEConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.formats import files
from supmim_jax.formats import timm as formats_timm

EXTRA = 'timm is not in the parity extra: pip install -e ".[timm]"'
torch = pytest.importorskip("torch", reason=EXTRA)
timm = pytest.importorskip("timm", reason=EXTRA)


@pytest.mark.parametrize(("model", "channels"), MODELS)
def test_timm_computes_the_same(supervised, tmp_path, model, channels):
    cfg, params, images = make(supervised, model, channels)
    files.write(tmp_path / "out", *export.WRITERS["timm"](params, cfg))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    ours = make_features(cfg, params, images)
    tokens = theirs.forward_features(pixels(images))
    assert_close(ours.tokens, patches(tokens))
    assert_close(ours.pooled, theirs.forward_head(tokens, pre_logits=True))
    assert_close(ours.logits, theirs(pixels(images)))


@pytest.mark.parametrize("pooling", ["gap", "cls"])
@pytest.mark.parametrize("arguments", [{}, {"num_classes": 0}])
def test_timm_loads_an_encoder_by_itself(supervised, tmp_path, pooling, arguments):
    headless = dataclasses.replace(supervised, objective=MAEConfig())
    cfg, params, images = make(headless, {"pooling": pooling}, 3)
    files.write(tmp_path / "out", *export.WRITERS["timm"](params, cfg))
    theirs = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, **arguments).eval()
    ours = make_features(cfg, params, images)
    assert_close(ours.tokens, patches(theirs.forward_features(pixels(images))))
    assert_close(ours.pooled, theirs(pixels(images)))


def test_the_transform_of_timm_makes_our_pixels(supervised, tmp_path):
    from PIL import Image

    cfg, params, _ = make(changed(supervised, data={"eval_resize": 30}), {}, 3)
    files.write(tmp_path / "out", *export.WRITERS["timm"](params, cfg))
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    expected = pixels(image[None, 5:25, 10:30].copy())[0]
    assert_close(expected, transform(Image.fromarray(image)))


@pytest.mark.parametrize("arguments", [{}, {"class_token": False, "global_pool": "avg"}])
def test_a_model_saved_by_timm_is_read(supervised, tmp_path, arguments):
    """By default with a position for the CLS token, which our CLS token takes in."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224",
        **dict(img_size=32, depth=2, num_classes=5, fc_norm=False),
        **arguments,
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn(parameter.shape)
    timm.models.save_for_hf(model, tmp_path / "saved", safe_serialization=True)
    cfg, params, _ = import_weights.load("timm", tmp_path / "saved", supervised)
    assert cfg.model.heads == 3 and cfg.data.eval_resize == 35  # crop_pct 0.9
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    assert_close(make_features(cfg, params, images).logits, model(pixels(images)))


PUBLISHED = [
    *("vit_tiny_patch16_224", "vit_small_patch32_224", "vit_small_patch16_384"),
    *("vit_base_patch8_224", "vit_base_patch16_224.mae", "vit_small_patch16_224.dino"),
    *("deit_tiny_patch16_224", "deit3_small_patch16_224", "deit3_medium_patch16_224"),
    *("vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"),
    *("vit_base_patch16_gap_224", "vit_base_patch32_siglip_gap_256"),
    "vit_so150m_patch16_reg4_gap_256",
]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_architectures_compute_here_what_they_compute_in_timm(name, tmp_path):
    """With random weights; pytest -s prints the differences of docs/encoders.md."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for part, parameter in model.named_parameters():
        if parameter.ndim == 1 or "pos_embed" in part or "token" in part:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    encoder = supmim_jax.load(tmp_path)
    side = encoder.config.data.image_size
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    mean, std = (torch.tensor(model.pretrained_cfg[x])[:, None, None] for x in ("mean", "std"))
    x = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        tokens = model.forward_features(x)
        pooled, logits = model.forward_head(tokens, pre_logits=True).numpy(), model(x).numpy()
    found = encoder.features(images)
    pairs = {"embedding": (found.pooled, pooled)}
    if found.logits is not None:
        pairs["logits"] = (found.logits, logits)
    for what, (ours, theirs) in pairs.items():
        difference = np.abs(np.asarray(ours) - theirs).max()
        print(f"{name} {what}: {difference:.1e} of {np.abs(theirs).max():.1f}")
        assert difference < 1e-4


def test_heads_and_activation_are_timms_or_the_architecture_is_refused():
    """Of all its ViTs, as their hub files are: with a name and without arguments."""
    accepted = 0
    for name in timm.list_models("*vit*") + timm.list_models("deit*"):
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
        if type(model) is not timm.models.VisionTransformer:
            continue
        arrays = {k: np.broadcast_to(np.float32(0), x.shape) for k, x in model.state_dict().items()}
        pretrained = {x: list(model.pretrained_cfg[x]) for x in ("mean", "std")}
        values = {"architecture": name, "global_pool": model.global_pool}
        config = files.Section(values | {"pretrained_cfg": pretrained}, name)
        try:
            found = formats_timm.read(files.Saved(name, arrays, config, config)).model
        except SetupError:
            continue
        block = model.blocks[0]
        if type(block.mlp) is not timm.layers.Mlp:  # refused by the shapes of its arrays
            continue
        tanh = "Tanh" in type(block.mlp.act).__name__
        assert (found.heads, found.gelu) == (block.attn.num_heads, ("exact", "tanh")[tanh]), name
        accepted += 1
    assert accepted > 60
