"""Encoders without a classifier that transformers has saved compute here what they do there."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import make_features
from test_export import EXTRA, assert_close

from supmim_jax import import_weights
from supmim_jax.config import MAEConfig
from supmim_jax.errors import SetupError

torch = pytest.importorskip("torch", reason=EXTRA)
hf = pytest.importorskip("transformers", minversion="5.9", reason=EXTRA)

SIZE = dict(
    hidden_size=32,
    num_hidden_layers=2,
    intermediate_size=56,
    num_attention_heads=4,
    image_size=24,
    patch_size=8,
    layer_norm_eps=1e-6,
)
DECODER = dict(
    decoder_hidden_size=16,
    decoder_num_hidden_layers=1,
    decoder_intermediate_size=24,
    decoder_num_attention_heads=2,
)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels


def random(model, fixed: str = "position_embeddings"):
    """The model with random weights, all but those whose names end so."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not name.endswith(fixed):
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.2 * noise + (1.0 if parameter.ndim == 1 else 0.0)
    return model.eval()


def mae(kind: str, positions: str):
    """A model of MAE's, with the positions that it starts from or others."""
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAEEmbeddings

    config = hf.ViTMAEConfig(**SIZE, **DECODER, mask_ratio=0.0)
    model = random(getattr(hf, kind)(config))
    encoder = model.vit if kind == "ViTMAEForPreTraining" else model
    fixed = ViTMAEEmbeddings(config)
    fixed.initialize_weights()  # within the whole model, HF 5.23 leaves them zero
    encoder.embeddings.position_embeddings.data = fixed.position_embeddings.data
    if positions == "learned":
        encoder.embeddings.position_embeddings.data += 0.1
    return model, encoder


def see(path, mean, std) -> None:
    """Writes what the model is to subtract from pixels, and divide them by."""
    values = {"image_mean": mean, "image_std": std, "size": {"height": 24, "width": 24}}
    (path / "preprocessor_config.json").write_text(json.dumps(values))


@pytest.mark.parametrize("positions", ["sincos2d", "learned"])
@pytest.mark.parametrize("kind", ["ViTMAEForPreTraining", "ViTMAEModel"])
def test_the_encoder_of_mae(supervised, tmp_path, capsys, kind, positions):
    model, encoder = mae(kind, positions)
    model.save_pretrained(tmp_path)
    see(tmp_path, MEAN, STD)
    cfg, params, _ = import_weights.load("transformers", tmp_path, supervised)
    assert cfg.objective == MAEConfig() and cfg.eval.which == ("knn",)
    assert (cfg.model.pooling, cfg.model.positions) == ("cls", positions)
    assert params.keys() == {"encoder"} and ("positions" in params["encoder"]) == (
        positions == "learned"
    )
    said = capsys.readouterr().out
    left = sum(name.startswith("decoder.") for name in model.state_dict())
    wanted = f"left out decoder.* ({left} arrays), no part of the encoder\n" if left else ""
    assert said.endswith(wanted) and bool(said) == bool(left)

    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    seen = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    noise = torch.arange(9.0).expand(3, -1)  # nothing is masked, and all keeps its order
    tokens = encoder(seen.permute(0, 3, 1, 2), noise=noise).last_hidden_state
    ours = make_features(cfg, params, images)
    assert_close(ours.pooled, tokens[:, 0])
    assert_close(np.reshape(ours.tokens, (3, 9, -1)), tokens[:, 1:])


def test_the_pooler_of_a_plain_vit_stays_behind(supervised, tmp_path, capsys):
    base = dataclasses.replace(supervised, objective=MAEConfig(mask_ratio=0.6))
    model = random(hf.ViTModel(hf.ViTConfig(**SIZE)), fixed="none")
    model.save_pretrained(tmp_path)
    cfg, params, _ = import_weights.load("transformers", tmp_path, base)
    assert cfg.objective == base.objective
    assert "left out pooler.* (2 arrays)" in capsys.readouterr().out
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    seen = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    assert_close(make_features(cfg, params, images).pooled, model(seen).last_hidden_state[:, 0])


@pytest.mark.parametrize(
    "processor",
    [
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 115.0, 104.0], "image_std": [58.0, 57.0, 59.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 1.1], "image_std": [1.0, 0.5, 2.0]},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": None, "do_normalize": None, "image_mean": MEAN, "image_std": STD},
    ],
)
def test_pixels_are_what_the_files_processor_makes_of_them(supervised, tmp_path, processor):
    model = random(hf.ViTModel(hf.ViTConfig(**SIZE)), fixed="none")
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    base = dataclasses.replace(supervised, objective=MAEConfig())
    cfg, params, _ = import_weights.load("transformers", tmp_path, base)
    images = np.random.default_rng(0).integers(0, 256, (3, 24, 24, 3), np.uint8)
    seen = images.astype(np.float64)
    if processor.get("do_rescale") is not False:
        seen = seen * processor.get("rescale_factor", 1 / 255)
    if processor.get("do_normalize") is not False:
        seen = (seen - processor.get("image_mean", 0.5)) / processor.get("image_std", 0.5)
    tokens = model(torch.from_numpy(seen).float().permute(0, 3, 1, 2)).last_hidden_state
    assert_close(make_features(cfg, params, images).pooled, tokens[:, 0])


@pytest.mark.parametrize(
    ("key", "value"),
    [("do_flip_channel_order", True), ("do_normalize", "no"), ("rescale_factor", 0)],
)
def test_a_processor_that_cannot_be_expressed_is_refused(supervised, tmp_path, key, value):
    hf.ViTModel(hf.ViTConfig(**SIZE)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    base = dataclasses.replace(supervised, objective=MAEConfig())
    with pytest.raises(SetupError, match=key):
        import_weights.load("transformers", tmp_path, base)


def test_what_published_conversions_say_of_epsilon_is_refused_with_what_to_do(supervised, tmp_path):
    hf.ViTMAEModel(hf.ViTMAEConfig(**SIZE | {"layer_norm_eps": 1e-12})).save_pretrained(tmp_path)
    with pytest.raises(SetupError, match=r"layer_norm_eps is 1e-12, .* write 1e-06 into config"):
        import_weights.load("transformers", tmp_path, supervised)
