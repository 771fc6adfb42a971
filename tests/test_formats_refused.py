"""Files that are broken, or not exactly a model of ours, are refused with what is wrong."""

import importlib
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_params, save
from safetensors.numpy import load_file, save_file

from supmim_jax import export, import_weights
from supmim_jax.batch import TrainState
from supmim_jax.config import Config, SupervisedConfig, ViTConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.formats import augreg, files, layout, timm

CFG = Config(
    model=ViTConfig(width=32, depth=1, mlp_dim=64, heads=2, pooling="cls"),
    objective=SupervisedConfig(),
)


@pytest.fixture(scope="module")
def params():
    return make_params(CFG)


@pytest.fixture
def exported(params, tmp_path):
    """Directories of the same model for timm and transformers."""
    for to in ("timm", "transformers"):
        files.write(tmp_path / to, *export.WRITERS[to](params, CFG))
    return tmp_path


def change_json(path, section="", **changes):
    config = json.loads(path.read_text())
    (config[section] if section else config).update(changes)
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm.weight": None}, r"norm.weight .*\[32\]"),
        ({"fc_norm.bias": np.zeros(32)}, r"fc_norm.bias is float64, .*float32"),
        ({"q_norm": np.zeros(3, np.float32)}, r"q_norm \[3\]"),
        ({"norm.bias": np.zeros(31, np.float32)}, r"norm.bias is \[31\], expected \[32\]"),
        (
            {"blocks.0.attn.qkv.weight": np.zeros((32, 96), np.float32)},
            r"blocks.0.attn.qkv.weight is \[32, 96\], expected \[96, 32\]",
        ),
    ],
)
def test_other_arrays_are_refused(exported, changes, message):
    weights = exported / "timm" / files.WEIGHTS
    tensors = load_file(weights) | changes
    save_file({name: x for name, x in tensors.items() if x is not None}, weights)
    with pytest.raises(SetupError, match=f"timm/model.safetensors.*{message}"):
        import_weights.load("timm", exported / "timm", CFG)


@pytest.mark.parametrize(
    ("source", "section", "changes", "message"),
    [
        ("timm", "model_args", {"depth": 2}, "depth is 2, .* with 1"),
        ("timm", "model_args", {"reg_tokens": 4}, "reg_tokens is 4, .* with 0"),
        ("timm", "model_args", {"img_size": [20, 24]}, r"img_size is \[20, 24\], .* with 20"),
        ("timm", "model_args", {"global_pool": "avg"}, "global_pool is 'avg'"),
        ("timm", "model_args", {"scale_mlp_norm": True}, "model_args has scale_mlp_norm"),
        ("timm", "model_args", {"act_layer": "quick_gelu"}, "act_layer is 'quick_gelu'.*'gelu'"),
        ("timm", "model_args", {"num_heads": 5}, "32, .* heads = 5"),
        ("timm", "pretrained_cfg", {"mean": ["0"]}, r"mean is \['0'\], expected"),
        ("transformers", "", {"model_type": "dinov2"}, "model_type is 'dinov2'.*'vit', 'ijepa'"),
        ("transformers", "", {"model_type": "ijepa"}, r"ijepa\.[\w.]+ is missing"),
        ("transformers", "", {"hidden_act": "relu"}, "config.json: hidden_act is 'relu'.*'gelu'"),
        ("transformers", "", {"layer_norm_eps": 1e-12}, "layer_norm_eps is 1e-12, expected 1e-06"),
        ("transformers", "", {"qkv_bias": False}, "qkv_bias is False, expected True"),
        ("transformers", "", {"num_channels": 2}, r"config\.data\.channels is 2; known are 1, 3"),
        ("transformers", "processor", {"image_std": [0.5, 0.5]}, r"image_std is \[0.5, 0.5\]"),
        ("transformers", "processor", {"image_std": 0.0}, "image_std is 0.0"),
        ("transformers", "processor", {"image_std": "half"}, "image_std is 'half'"),
        ("transformers", "processor", {"do_flip_channel_order": True}, "do_flip_channel_order is"),
        ("transformers", "processor", {"do_normalize": "no"}, "do_normalize is 'no'"),
        ("transformers", "processor", {"rescale_factor": 0}, "rescale_factor is 0"),
    ],
)
def test_other_models_are_refused(exported, source, section, changes, message):
    if section == "processor":
        change_json(exported / source / files.PROCESSOR, **changes)
    else:
        change_json(exported / source / files.CONFIG, section, **changes)
    with pytest.raises(SetupError, match=message):
        import_weights.load(source, exported / source, CFG)


def test_what_neither_arrays_nor_arguments_tell_is_known_by_name_or_asked_for(exported):
    arrays = load_file(exported / "timm" / files.WEIGHTS)
    for name, heads, gelu in (
        ("vit_huge_patch14_224", 16, "exact"),
        ("vit_so400m_patch14_siglip_gap_384", 16, "exact"),
        ("vit_so400m_patch16_siglip_gap_384", 16, "tanh"),
        ("vit_large_patch16_siglip_gap_512", 1, "tanh"),
        ("vit_base_patch16_gap_224", 16, "exact"),
    ):
        width = 32 if heads == 16 else 64
        wide = arrays | {"patch_embed.proj.weight": np.zeros((width, 1, 4, 4), np.float32)}
        config = files.Section({"architecture": name}, "x")
        model = timm.read(files.Saved("x", wide, config, config)).model
        assert (model.heads, model.gelu) == (heads, gelu), name
    config = exported / "timm" / files.CONFIG
    change_json(config, architecture="vit_of_my_own")
    import_weights.load("timm", exported / "timm", CFG)
    change_json(config, "model_args", num_heads=None)
    with pytest.raises(SetupError, match=r"no num_heads.*'vit_of_my_own'"):
        import_weights.load("timm", exported / "timm", CFG)


def test_broken_files_are_named(exported, tmp_path):
    directory = exported / "timm"
    config = directory / files.CONFIG
    weights = (directory / files.WEIGHTS).read_bytes()
    cut = directory / "cut.safetensors", tmp_path / "cut.npz"
    for content in (b"", b"PK\x03\x04", b"\x93NUMPY", weights[:1000], weights[:-1]):
        for source, path in zip(("timm", "augreg"), cut):
            path.write_bytes(content)
            with pytest.raises(SetupError, match=rf"{path} cannot be read"):
                import_weights.load(source, path, CFG)
    for path, remove in (
        (config, lambda: config.write_text("{")),
        (config, config.unlink),
        (directory, lambda: shutil.rmtree(directory)),
    ):
        remove()
        with pytest.raises(SetupError, match=str(path)):
            import_weights.load("timm", directory, CFG)


@pytest.mark.parametrize(("dtype", "named"), [("F8_E4M3", "float8_e4m3fn"), ("I8", "int8")])
def test_arrays_of_another_type_are_named(tmp_path, dtype, named):
    path, header = tmp_path / files.WEIGHTS, {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}
    text = json.dumps({"a": header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(SetupError, match=rf"{path}.*{named}.*expected float32"):
        files.read_safetensors(path)


def test_nothing_is_overwritten(exported):
    before = sorted(exported.rglob("*"))
    with pytest.raises(SetupError, match="timm already exists"):
        export.export("nowhere", "timm", exported / "timm")
    with pytest.raises(SetupError, match="timm is not empty"):
        import_weights.save(exported / "timm", CFG, {})
    with pytest.raises(TypeError):
        files.write(exported / "new", {}, {"config.json": {"x": object()}})
    assert sorted(exported.rglob("*")) == before


@pytest.mark.parametrize("leaves", ["segmenter", "tokenizer"])
def test_a_run_of_neither_classifier_nor_encoder_is_not_exported_nor_a_config(
    exported, tmp_path, leaves
):
    name = {"segmenter": "finetune_segmentation_debug", "tokenizer": "vqgan_debug"}[leaves]
    cfg = importlib.import_module(f"configs.{name}").experiment()
    state = TrainState(jnp.zeros((), jnp.int32), {"x": jnp.zeros(1)}, {}, ())
    save(cfg, tmp_path / "run", state)
    with pytest.raises(SetupError, match=f"leaves a {leaves}"):
        export.export(str(tmp_path / "run"), "timm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SetupError, match=f"objective '{cfg.objective.name}'"):
        import_weights.load("timm", exported / "timm", cfg)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cls": None}, "26 patch positions"),
        ({"head/kernel": None}, r"head/bias \[30\]"),
        ({"pre_logits/bias": np.zeros(3, np.float32)}, r"pre_logits/bias \[3\]"),
        ({"Transformer/encoder_norm/bias": None}, "encoder_norm/bias is missing"),
        ({"embedding/kernel": np.zeros((4, 32), np.float32)}, "embedding/kernel .* 0 times"),
        ({"MAPHead_0/probe": np.zeros((1, 1, 32), np.float32)}, "MAPHead_0.*attention pooling"),
        (
            {"img/embedding/kernel": np.zeros((4, 4, 1, 32), "f")},
            "embedding/kernel is there 2 times",
        ),
        ({"Transformer/encoderblock_0/MlpBlock_7/x": np.zeros(1, "f")}, "MlpBlock_3, MlpBlock_7"),
        ({"cls": np.array([{}], object)}, "allow_pickle"),
    ],
)
def test_other_npz_files_are_refused(params, tmp_path, changes, message):
    arrays = layout.to_foreign(params, augreg.rows(CFG.model, 1, head=True), 1) | changes
    arrays = {k: x for k, x in arrays.items() if x is not None}
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(SetupError, match=rf"x\.npz.*{message}"):
        import_weights.load("augreg", tmp_path / "x.npz", CFG)


def test_fixed_positions_ask_for_the_image_size(params, tmp_path):
    arrays = layout.to_foreign(params, augreg.rows(CFG.model, 1, head=True))
    np.savez(tmp_path / "x.npz", **{k: x for k, x in arrays.items() if "pos_emb" not in k})
    cfg = changed(CFG, data={"image_size": 24, "eval_resize": 24})
    assert import_weights.load("augreg", tmp_path / "x.npz", cfg)[0].data.image_size == 24
    cfg = changed(cfg, data={"image_size": 18}, model={"patch": 6})
    with pytest.raises(SetupError, match=r"18 .* patches of 4.*image_size"):
        import_weights.load("augreg", tmp_path / "x.npz", cfg)
