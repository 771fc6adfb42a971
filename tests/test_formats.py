"""Files for timm and transformers: names, exact round trips, and the two commands."""

import dataclasses
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY, make_features, make_params, restored
from etils import epath
from flax import traverse_util

from supmim_jax import checkpoint, export, import_weights, probe, sharding, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, MAEConfig
from supmim_jax.formats import files, timm

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
    evaluation = dataclasses.replace(supervised.eval, which=("knn",))
    return dataclasses.replace(supervised, objective=MAEConfig(mask_ratio=0.6), eval=evaluation)


def with_model(cfg, **fields):
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, drop_path=0.0, **fields))


def write(cfg, params, to, out):
    files.write(out, *export.WRITERS[to](params, cfg))
    return out


def assert_same(a, b):
    a, b = (traverse_util.flatten_dict(x, sep="/") for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_timm_names_and_shapes(supervised):
    cfg = with_model(supervised, depth=1, pooling="cls", layer_scale=0.1)
    tensors, _ = timm.write(make_params(cfg), cfg)
    assert {name: x.shape for name, x in tensors.items()} == TIMM


def test_timm_has_no_head_where_ours_has_none(mae):
    cfg = with_model(mae, depth=1, pooling="cls", layer_scale=0.1)
    tensors, documents = timm.write(make_params(cfg), cfg)
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes == {name: x for name, x in TIMM.items() if not name.startswith("head.")}
    config = documents["config.json"]
    for section in (config, config["model_args"], config["pretrained_cfg"]):
        assert section["num_classes"] == 0


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("pooling", ["gap", "cls"])
@pytest.mark.parametrize("positions", ["learned", "sincos2d"])
def test_export_and_import_are_inverse_bit_for_bit(supervised, tmp_path, to, pooling, positions):
    scale = 0.1 if to == "timm" else 0.0
    cfg = with_model(
        supervised, pooling=pooling, positions=positions, gelu="tanh", layer_scale=scale
    )
    params = make_params(cfg)
    found, back, _ = import_weights.load(to, write(cfg, params, to, tmp_path / "out"), cfg)
    assert_same(back, params)
    assert found == cfg  # eval_resize, classes, channels and the rest of the data section too


@pytest.mark.parametrize("to", ["timm", "transformers"])
@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_an_encoder_by_itself_comes_back_too(mae, supervised, tmp_path, capsys, to, pooling):
    cfg = with_model(mae, pooling=pooling)
    params = make_params(cfg)
    assert params.keys() == {"encoder"}
    out = write(cfg, params, to, tmp_path / "out")
    found, back, _ = import_weights.load(to, out, cfg)
    assert_same(back, params)
    assert found == cfg
    other, back, _ = import_weights.load(to, out, supervised)
    assert_same(back, params)
    assert other.objective == MAEConfig() and other.eval.which == ("knn",)
    assert other.data == supervised.data and capsys.readouterr().out == ""


def test_layer_scale_goes_into_the_weights_for_transformers(supervised, tmp_path):
    cfg = with_model(supervised, layer_scale=0.1)
    params = make_params(cfg)
    found, back, _ = import_weights.load(
        "transformers", write(cfg, params, "transformers", tmp_path / "out"), cfg
    )
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


def test_the_command_exports_an_encoder_and_probe_measures_it_imported(mae, one_device, tmp_path):
    cfg = with_model(mae)
    state = train_step.build(cfg, one_device).init(jax.random.key(0))
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", cfg.checkpoint)
    checkpoints.save(state, cfg, checkpoint.BEGIN)
    checkpoints.close()
    out, imported = tmp_path / "out", epath.Path(tmp_path / "imported")
    export.export(str(tmp_path / "run"), "transformers", out)
    import_weights.save(imported, *import_weights.load("transformers", out, cfg))
    found, original = (
        probe.probe(Checkpoint.open(str(d))).results for d in (imported, tmp_path / "run")
    )
    assert found == original


def test_both_commands_and_what_probe_and_a_resume_read(cfg, one_device, tmp_path):
    """A whole SupMIM run's checkpoint: its decoder stays behind."""
    built = train_step.build(cfg, one_device)
    params = make_params(cfg)
    state = built.init(jax.random.key(0))
    placed = sharding.put(params, {name: built.state.params[name] for name in params})
    checkpoints = checkpoint.Checkpoints(tmp_path / "run", cfg.checkpoint)
    checkpoints.save(state.replace(params=state.params | placed), cfg, checkpoint.BEGIN)
    checkpoints.close()

    def command(*arguments):
        out = subprocess.run(
            [sys.executable, "-m", *arguments], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert out.returncode == 0, out.stderr
        return out.stdout

    run, out, workdir = (tmp_path / name for name in ("run", "out", "imported"))
    said = command("supmim_jax.export", f"--checkpoint={run}@0", "--to=timm", f"--out={out}")
    assert str(out) in said
    command(
        "supmim_jax.import_weights",
        *("--from=timm", f"--path={out}", f"--workdir={workdir}"),
        *("--config=configs/debug_supervised.py", "--config.data.train_split=train[:64]"),
        *("--config.data.train_examples=64", f"--config.data.data_dir={cfg.data.data_dir}"),
    )
    imported = checkpoint.locate(str(workdir))
    found = Checkpoint.read(imported).config
    assert found.model == with_model(cfg).model and found.objective.name == "supervised"
    assert Checkpoint.read(imported).run == checkpoint.BEGIN
    like = train_step.build(found, one_device).state
    state, _ = restored(workdir, 0, like)
    assert_same(state.params, params)
    found, original = (probe.probe(Checkpoint.open(str(d))).results for d in (workdir, run))
    assert found == original
