"""Models that transformers has saved, as MAE's encoder, compute here what they do there."""

import dataclasses
import json

import numpy as np
import pytest
from conftest import make_features
from test_parity import HF_DECODER, HF_MODEL, SIDE, SIZE, assert_close, hf, hf_mae, randomize, torch

from supmim_jax import import_weights
from supmim_jax.config import MAEConfig

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet's pixels
IMAGES = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
SEEN = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture(scope="module")
def vit():
    return randomize(hf.ViTModel(hf.ViTConfig(**HF_MODEL)))[0]


@pytest.mark.parametrize("pooling", ["cls", "gap"])
def test_a_classifier(supervised, tmp_path, pooling):
    """With its own position for the CLS token, which our CLS token takes in."""
    config, model = {
        "cls": (hf.ViTConfig, hf.ViTForImageClassification),
        "gap": (hf.IJepaConfig, hf.IJepaForImageClassification),
    }[pooling]
    model, _ = randomize(model(config(**HF_MODEL)))
    model.save_pretrained(tmp_path)
    cfg, params, _ = import_weights.load("transformers", tmp_path, supervised)
    assert (cfg.model.pooling, cfg.data.num_classes, cfg.data.eval_resize) == (pooling, 2, SIZE)
    assert_close(make_features(cfg, params, IMAGES).logits, model(SEEN).logits)


@pytest.mark.parametrize(
    ("kind", "positions"), [("ViTMAEForPreTraining", "sincos2d"), ("ViTMAEModel", "learned")]
)
def test_the_encoder_of_mae(supervised, tmp_path, capsys, kind, positions):
    config = hf.ViTMAEConfig(**HF_MODEL, **HF_DECODER, mask_ratio=0.0)
    model, _ = randomize(getattr(hf, kind)(config))
    encoder = getattr(model, "vit", model)
    fixed = hf_mae.ViTMAEEmbeddings(config)
    fixed.initialize_weights()  # within the whole model, HF 5.23 leaves them zero
    encoder.embeddings.position_embeddings.data = fixed.position_embeddings.data
    if positions == "learned":
        encoder.embeddings.position_embeddings.data += 0.1
    model.save_pretrained(tmp_path)
    processor = {"image_mean": MEAN, "image_std": STD, "size": {"height": SIZE, "width": SIZE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))

    cfg, params, _ = import_weights.load("transformers", tmp_path, supervised)
    assert cfg.objective == MAEConfig() and cfg.eval.which == ("knn",)
    assert (cfg.model.pooling, cfg.model.positions) == ("cls", positions)
    assert params.keys() == {"encoder"}
    assert ("positions" in params["encoder"]) == (positions == "learned")
    left = sum(name.startswith("decoder.") for name in model.state_dict())
    said = capsys.readouterr().out
    assert f"left out decoder.* ({left} arrays)" in said if left else not said

    seen = (torch.from_numpy(IMAGES) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    noise = torch.arange(float(SIDE**2)).expand(3, -1)  # nothing is masked, and all keeps its order
    tokens = encoder(seen.permute(0, 3, 1, 2), noise=noise).last_hidden_state
    ours = make_features(cfg, params, IMAGES)
    assert_close(ours.pooled, tokens[:, 0])
    assert_close(np.reshape(ours.tokens, (3, SIDE**2, -1)), tokens[:, 1:])


@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"do_normalize": False},
        {"do_rescale": False, "image_mean": [120.0, 115.0, 104.0], "image_std": [58.0, 57.0, 59.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 0.9, 1.1], "image_std": [1.0, 0.5, 2.0]},
        {"do_rescale": False, "do_normalize": False},
        {"do_rescale": None, "do_normalize": None, "image_mean": MEAN, "image_std": STD},
    ],
)
def test_pixels_are_what_the_files_processor_makes_of_them(
    supervised, tmp_path, capsys, vit, processor
):
    vit.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    base = dataclasses.replace(supervised, objective=MAEConfig(mask_ratio=0.6))
    cfg, params, _ = import_weights.load("transformers", tmp_path, base)
    assert cfg.objective == base.objective
    assert "left out pooler.* (2 arrays)" in capsys.readouterr().out
    seen = IMAGES.astype(np.float64)
    if processor.get("do_rescale") is not False:
        seen = seen * processor.get("rescale_factor", 1 / 255)
    if processor.get("do_normalize") is not False:
        seen = (seen - processor.get("image_mean", 0.5)) / processor.get("image_std", 0.5)
    tokens = vit(torch.from_numpy(seen).float().permute(0, 3, 1, 2)).last_hidden_state
    assert_close(make_features(cfg, params, IMAGES).pooled, tokens[:, 0])
