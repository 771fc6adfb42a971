"""Files that are broken, or not exactly a model of ours, are refused with what is wrong."""

import dataclasses
import importlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_params
from safetensors.numpy import load_file, save_file

from supmim_jax import checkpoint, export, import_weights
from supmim_jax.batch import TrainState
from supmim_jax.errors import SetupError
from supmim_jax.formats import augreg, files, layout, timm
from supmim_jax.formats.layout import to_foreign


@pytest.fixture
def exported(supervised, tmp_path):
    """Directories of the same model for timm and transformers."""
    model = dataclasses.replace(supervised.model, depth=1, pooling="cls")
    cfg = dataclasses.replace(supervised, model=model)
    params = make_params(cfg)
    for to in ("timm", "transformers"):
        files.write(tmp_path / to, *export.WRITERS[to](params, cfg))
    return cfg, tmp_path


def change_tensors(directory, **changes):
    tensors = load_file(directory / files.WEIGHTS)
    tensors = {name: x for name, x in (tensors | changes).items() if x is not None}
    save_file(tensors, directory / files.WEIGHTS)


def change_config(directory, section="", **changes):
    config = json.loads((directory / "config.json").read_text())
    (config[section] if section else config).update(changes)
    (directory / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"norm.weight is missing, expected \[32\]"),
        ({"fc_norm.bias": np.zeros(32)}, r"fc_norm.bias is float64, expected float32"),
        ({"q_norm": np.zeros(3, np.float32)}, r"q_norm \[3\] is not expected"),
        ({"norm.bias": np.zeros(31, np.float32)}, r"norm.bias is \[31\], expected \[32\]"),
        (
            {"blocks.0.attn.qkv.weight": np.zeros((32, 96), np.float32)},
            r"blocks.0.attn.qkv.weight is \[32, 96\], expected \[96, 32\]",
        ),
    ],
)
def test_other_arrays_are_refused(exported, changes, message):
    cfg, path = exported
    change_tensors(path / "timm", **changes)
    with pytest.raises(SetupError, match=f"timm/model.safetensors.*{message}"):
        import_weights.load("timm", path / "timm", cfg)


@pytest.mark.parametrize(
    ("source", "section", "changes", "message"),
    [
        ("timm", "model_args", {"depth": 2}, "depth=2, .* a model with 1"),
        ("timm", "model_args", {"reg_tokens": 4}, "reg_tokens=4, .* a model with 0"),
        ("timm", "model_args", {"img_size": [20, 24]}, r"img_size=\[20, 24\], .* a model with 20"),
        ("timm", "model_args", {"global_pool": "avg"}, "global_pool is 'avg' with a CLS token"),
        ("timm", "model_args", {"scale_mlp_norm": True}, "model_args has scale_mlp_norm, which"),
        ("timm", "model_args", {"act_layer": "quick_gelu"}, "act_layer is 'quick_gelu'.*known are"),
        ("timm", "model_args", {"num_heads": 5}, "width is 32, not a multiple of heads = 5"),
        ("timm", "pretrained_cfg", {"mean": ["0"]}, r"mean is \['0'\], expected"),
        ("transformers", "", {"model_type": "dinov2"}, "model_type is 'dinov2'.*'vit', 'ijepa'"),
        ("transformers", "", {"model_type": "ijepa"}, r"ijepa\.[\w.]+ is missing"),
        ("transformers", "", {"hidden_act": "relu"}, "hidden_act is 'relu'.*known are 'gelu'"),
        ("transformers", "", {"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12, expected 1e-06"),
        ("transformers", "", {"qkv_bias": False}, "qkv_bias is False, expected True"),
        ("transformers", "", {"num_channels": 2}, r"config\.data\.channels is 2; known are 1, 3"),
    ],
)
def test_other_models_are_refused(exported, source, section, changes, message):
    cfg, path = exported
    change_config(path / source, section, **changes)
    with pytest.raises(SetupError, match=message):
        import_weights.load(source, path / source, cfg)


def test_what_neither_arrays_nor_arguments_tell_is_known_by_name_or_asked_for(exported):
    cfg, path = exported
    arrays = load_file(path / "timm" / files.WEIGHTS)
    for name, heads, gelu in (
        ("vit_huge_patch14_224", 16, "exact"),
        ("vit_so400m_patch14_siglip_gap_384", 16, "exact"),
        ("vit_so400m_patch16_siglip_gap_384", 16, "tanh"),
        ("vit_large_patch16_siglip_gap_512", 1, "tanh"),
        ("vit_base_patch16_gap_224", 16, "exact"),
    ):
        width = 32 if heads == 16 else 64
        wide = arrays | {"patch_embed.proj.weight": np.zeros((width, 1, 4, 4), np.float32)}
        document = {"architecture": name}
        model = timm.read({"config.json": document}, wide, "x").model
        assert (model.heads, model.gelu) == (heads, gelu), name
    change_config(path / "timm", architecture="vit_of_my_own")
    import_weights.load("timm", path / "timm", cfg)
    change_config(path / "timm", "model_args", num_heads=None)
    with pytest.raises(SetupError, match=r"no num_heads.*'vit_of_my_own'"):
        import_weights.load("timm", path / "timm", cfg)


def test_broken_files_are_named(exported, tmp_path):
    cfg, path = exported
    weights = path / "timm" / files.WEIGHTS
    for size in (0, 5, 1000, weights.stat().st_size - 1):
        (path / "timm" / "cut.safetensors").write_bytes(weights.read_bytes()[:size])
        with pytest.raises(SetupError, match=r"cut\.safetensors cannot be read as safetensors"):
            import_weights.load("timm", path / "timm" / "cut.safetensors", cfg)
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY", b"junk"):
        (tmp_path / "cut.npz").write_bytes(content)
        with pytest.raises(SetupError, match=r"cut\.npz cannot be read as \.npz"):
            import_weights.load("augreg", tmp_path / "cut.npz", cfg)
    np.savez(tmp_path / "objects.npz", cls=np.array([{}], object))
    with pytest.raises(SetupError, match=r"objects\.npz cannot be read"):
        import_weights.load("augreg", tmp_path / "objects.npz", cfg)
    (path / "timm" / "config.json").write_text("{")
    with pytest.raises(SetupError, match=r"config\.json cannot be read"):
        import_weights.load("timm", path / "timm", cfg)
    (path / "timm" / "config.json").unlink()
    with pytest.raises(SetupError, match=r"config\.json does not exist"):
        import_weights.load("timm", path / "timm", cfg)
    shutil.rmtree(path / "timm")
    with pytest.raises(SetupError, match="timm does not exist"):
        import_weights.load("timm", path / "timm", cfg)


def test_nothing_is_overwritten(exported):
    cfg, path = exported
    before = sorted(path.rglob("*"))
    with pytest.raises(SetupError, match="timm already exists"):
        export.export("nowhere", "timm", path / "timm")
    with pytest.raises(SetupError, match="timm is not empty"):
        import_weights.save(path / "timm", cfg, {})
    with pytest.raises(TypeError):
        files.write(path / "new", {}, {"config.json": {"x": object()}})
    assert sorted(path.rglob("*")) == before


@pytest.mark.parametrize("leaves", ["segmenter", "tokenizer"])
def test_a_run_of_neither_classifier_nor_encoder_is_not_exported(supervised, tmp_path, leaves):
    name = {"segmenter": "finetune_segmentation_debug", "tokenizer": "vqgan_debug"}[leaves]
    cfg = importlib.import_module(f"configs.{name}").experiment()
    state = TrainState(jnp.zeros((), jnp.int32), {"x": jnp.zeros(1)}, {}, ())
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", cfg.checkpoint)
    checkpoints.save(state, cfg, checkpoint.BEGIN)
    checkpoints.close()
    with pytest.raises(SetupError, match=f"which leaves a {leaves}, neither a classifier"):
        export.export(str(tmp_path / "run"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("std", [[0.5, 0.5], 0.0, "half"])
def test_other_pixels_are_refused(exported, std):
    cfg, path = exported
    processor = path / "transformers" / "preprocessor_config.json"
    values = json.loads(processor.read_text()) | {"image_std": std}
    processor.write_text(json.dumps(values))
    with pytest.raises(SetupError, match=r"image_std is .*, expected a positive number for each"):
        import_weights.load("transformers", path / "transformers", cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": None}, "has 26 patch positions, expected a square number"),
        ({"head/kernel": None}, r"head/bias \[30\] is not expected"),
        ({"pre_logits/bias": np.zeros(3, np.float32)}, r"pre_logits/bias \[3\] is not expected"),
        ({"Transformer/encoder_norm/bias": None}, "encoder_norm/bias is missing"),
        (
            {"embedding/kernel": np.zeros((4, 32), np.float32)},
            "embedding/kernel is there 0 times.* 4 dim",
        ),
    ],
)
def test_other_npz_files_are_refused(supervised, tmp_path, changes, message):
    model = dataclasses.replace(supervised.model, pooling="cls")
    cfg = dataclasses.replace(supervised, model=model)
    params = layout.with_positions(make_params(cfg), cfg.model, cfg.data)
    names = {"positions": augreg.POSITIONS[0], "norm1": "LayerNorm_0", "norm2": "LayerNorm_2"}
    names |= {"attention": "MultiHeadDotProductAttention_1", "mlp": "MlpBlock_3"}
    rows = augreg.layout(cfg.model, 1, 25, names, head=True, prefix=1)
    arrays = to_foreign(params, rows) | changes
    np.savez(tmp_path / "x.npz", **{k: x for k, x in arrays.items() if x is not None})
    with pytest.raises(SetupError, match=rf"x\.npz.*{message}"):
        import_weights.load("augreg", tmp_path / "x.npz", cfg)


@pytest.mark.parametrize("name", ["vqgan_debug", "finetune_segmentation_debug"])
def test_a_config_that_trains_no_classifier_is_refused(name):
    base = importlib.import_module(f"configs.{name}").experiment()
    with pytest.raises(SetupError, match=rf"is of objective '{base.objective.name}', which trains"):
        import_weights.combine(base, None)
