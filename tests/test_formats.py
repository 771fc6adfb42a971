"""Files for timm and transformers: names, exact round trips, checkpoints of them."""

import numpy as np
import pytest
from conftest import make_features, make_params, python, restored, save_initial
from etils import epath
from flax import traverse_util

from supmim_jax import export, import_weights, probe
from supmim_jax.checkpoint import BEGIN, Checkpoint
from supmim_jax.config import Config, MAEConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.formats import files, timm
from supmim_jax.train_step import TrainStep

# What timm 1.0.31 has for vit_base_patch16_224 with these arguments and one block.
TIMM = {
    "pos_embed": (1, 25, 32),
    "cls_token": (1, 1, 32),
    "patch_embed.proj.weight": (32, 1, 4, 4),
    "patch_embed.proj.bias": (32,),
    "blocks.0.norm1.weight": (32,),
    "blocks.0.norm1.bias": (32,),
    "blocks.0.attn.qkv.weight": (96, 32),
    "blocks.0.attn.qkv.bias": (96,),
    "blocks.0.attn.proj.weight": (32, 32),
    "blocks.0.attn.proj.bias": (32,),
    "blocks.0.ls1.gamma": (32,),
    "blocks.0.norm2.weight": (32,),
    "blocks.0.norm2.bias": (32,),
    "blocks.0.mlp.fc1.weight": (64, 32),
    "blocks.0.mlp.fc1.bias": (64,),
    "blocks.0.mlp.fc2.weight": (32, 64),
    "blocks.0.mlp.fc2.bias": (32,),
    "blocks.0.ls2.gamma": (32,),
    "norm.weight": (32,),
    "norm.bias": (32,),
    "head.weight": (30, 32),
    "head.bias": (30,),
}


@pytest.fixture
def mae(supervised) -> Config:
    """A run that leaves an encoder without a head."""
    return changed(supervised, objective=MAEConfig(mask_ratio=0.6), eval={"which": ("knn",)})


def with_model(cfg, **fields):
    return changed(cfg, model={"drop_path": 0.0, **fields})


def through_files(cfg, params, to, out, base=None):
    """The config, parameters and class names of what was exported and imported."""
    if not out.exists():
        files.write(out, *export.WRITERS[to](params, cfg))
    return import_weights.load(to, out, base or cfg)


def assert_same(a, b):
    a, b = (traverse_util.flatten_dict(x, sep="/") for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.parametrize("leaves", ["classifier", "encoder"])
def test_timm_names_and_shapes(supervised, mae, leaves):
    cfg = {"classifier": supervised, "encoder": mae}[leaves]
    cfg = with_model(cfg, depth=1, pooling="cls", layer_scale=0.1)
    tensors, documents = timm.write(make_params(cfg), cfg)
    head = leaves == "classifier"
    assert {name: x.shape for name, x in tensors.items()} == {
        name: shape for name, shape in TIMM.items() if head or not name.startswith("head.")
    }
    config = documents["config.json"]
    for section in (config, config["model_args"], config["pretrained_cfg"]):
        assert section["num_classes"] == (30 if head else 0)


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("pooling", ["gap", "cls"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_export_and_import_are_inverse_bit_for_bit(supervised, tmp_path, to, pooling, positions):
    scale = 0.1 if to == "timm" else 0.0
    cfg = with_model(
        supervised, pooling=pooling, positions=positions, gelu="tanh", layer_scale=scale
    )
    params = make_params(cfg)
    found, back, _ = through_files(cfg, params, to, tmp_path / "out")
    assert_same(back, params)
    assert found == cfg  # eval_resize, classes, channels and the rest of the data section too


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_an_encoder_by_itself_comes_back_too(mae, supervised, tmp_path, capsys, to, pooling):
    cfg = with_model(mae, pooling=pooling)
    params = make_params(cfg)
    assert params.keys() == {"encoder"}
    found, back, _ = through_files(cfg, params, to, tmp_path / "out")
    assert_same(back, params)
    assert found == cfg
    other, back, _ = through_files(cfg, params, to, tmp_path / "out", supervised)
    assert_same(back, params)
    assert other.objective == MAEConfig() and other.eval.which == ("knn",)
    assert other.data == supervised.data and capsys.readouterr().out == ""


def test_layer_scale_goes_into_the_weights_for_transformers(supervised, tmp_path):
    cfg = with_model(supervised, layer_scale=0.1)
    params = make_params(cfg)
    found, back, _ = through_files(cfg, params, "transformers", tmp_path / "out")
    assert found == with_model(cfg, layer_scale=0.0)
    images = np.random.default_rng(1).integers(0, 256, (4, 20, 20, 1), np.uint8)
    ours, theirs = (make_features(*x, images).logits for x in ((cfg, params), (found, back)))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


def test_every_parameter_needs_a_row(supervised):
    params = make_params(supervised)
    params["encoder"]["surplus"] = np.zeros(3, np.float32)
    with pytest.raises(ValueError, match="encoder/surplus"):
        export.WRITERS["timm"](params, supervised)


@pytest.mark.parametrize(("mlp_dim", "width"), [(6144, 1408), (4304, 1152), (5, 3), (257, 100)])
def test_timm_gets_our_mlp_dim_and_eval_resize_back(mlp_dim, width):
    assert int(width * timm.ratio(mlp_dim, width)) == mlp_dim
    for resize in (width, mlp_dim):
        assert int(width / timm.crop(width, resize)) == resize


def test_probe_measures_of_an_imported_encoder_what_it_measures_of_the_run(mae, tmp_path):
    cfg, imported = with_model(mae), epath.Path(tmp_path / "imported")
    run = save_initial(cfg, tmp_path / "run")
    export.export(run, "transformers", tmp_path / "out")
    import_weights.save(imported, *import_weights.load("transformers", tmp_path / "out", cfg))
    found, original = (probe.probe(Checkpoint.open(str(x))).results for x in (imported, run))
    assert found == original


def test_imported_weights_belong_to_no_data_but_those_that_are_named(supervised, tmp_path):
    run, imported = save_initial(supervised, tmp_path / "run"), epath.Path(tmp_path / "imported")
    export.export(run, "timm", tmp_path / "out")
    import_weights.save(imported, *import_weights.load("timm", tmp_path / "out"))
    checkpoint = Checkpoint.open(str(imported))
    with pytest.raises(SetupError, match=r"config\.data\.name is ''.*imported without --config"):
        probe.probe(checkpoint)
    card = export.model_card(checkpoint, "timm", "", ())
    assert "The weights were imported" in card and "fractals" not in card


def test_the_command_makes_a_checkpoint_that_a_run_may_resume(cfg, one_device, tmp_path):
    """Of a SupMIM run, whose decoder stays behind."""
    run = save_initial(cfg, tmp_path / "run")
    export.export(f"{run}@0", "timm", tmp_path / "out")
    flags = ["--from=timm", f"--path={tmp_path / 'out'}", f"--workdir={tmp_path / 'imported'}"]
    flags += ["--config=configs/debug_supervised.py", "--config.data.train_split=train[:64]"]
    flags += ["--config.data.train_examples=64"]
    ran = python("-m", "supmim_jax.import_weights", *flags)
    assert ran.returncode == 0, ran.stderr
    imported = Checkpoint.open(str(tmp_path / "imported"))
    assert imported.config.model == with_model(cfg).model
    assert imported.config.objective.name == "supervised" and imported.run == BEGIN
    state, _ = restored(
        tmp_path / "imported", 0, TrainStep.build(imported.config, one_device).state
    )
    original = Checkpoint.open(run)
    assert_same(state.params, original.restore_params(state.params))
