"""Runs that start from another run's encoder."""

import shutil

import jax
import numpy as np
import pytest
from conftest import ONE, make_batch, make_frozen, random_state, restored, same, save
from flax import nnx
from PIL import Image

from supmim_jax import encoder as encoder_module
from supmim_jax import init_from, sharding
from supmim_jax.config import (
    Config,
    MAEConfig,
    MeshConfig,
    VQGANConfig,
    VQGANObjectiveConfig,
    changed,
)
from supmim_jax.errors import SetupError
from supmim_jax.formats import layout
from supmim_jax.models.transformer import sincos2d
from supmim_jax.models.vit import ViT
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("build_once")


def started(cfg: Config, step_fn):
    return init_from.InitialState.open(cfg, step_fn).make()


@pytest.fixture
def source(cfg, tmp_path) -> tuple[str, dict]:
    """The workdir of a SupMIM run, and its parameters."""
    state = random_state(cfg, 7)
    return save(cfg, tmp_path / "source", state), jax.tree.map(np.asarray, state.params)


@pytest.mark.parametrize(("objective", "head"), [("supervised", "new"), ("supmim", "keep")])
def test_the_encoder_is_the_checkpoints_and_the_rest_is_new(
    cfg, supervised, source, objective, head
):
    workdir, theirs = source
    base = {"supervised": supervised, "supmim": cfg}[objective]
    model = {"drop_path": 0.3, "dtype": "bfloat16", "remat": "full"}  # may differ
    cfg = changed(base, init={"checkpoint": f"{workdir}@7", "head": head}, model=model)
    prog = TrainStep.build(cfg, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    state, fresh = started(cfg, prog), prog.init(jax.random.key(cfg.seed))
    kept = {"encoder", "head"} if head == "keep" else {"encoder"}
    assert set(state.params) == set(fresh.params) == set(prog.state.params)
    for name in state.params:
        assert same(state.params[name], (theirs if name in kept else fresh.params)[name]), name
    assert same(state.replace(params=0), fresh.replace(params=0))
    assert int(state.step) == 0
    layouts = [jax.tree.map(lambda x: x.sharding, x) for x in (state, prog.state)]
    assert layouts[0] == layouts[1]


def test_features_and_logits_are_those_of_the_checkpoint(supervised, source, one_device):
    workdir, theirs = source
    cfg = changed(supervised, init={"checkpoint": f"{workdir}@7", "head": "keep"})
    images = make_batch(cfg).views[0]
    runner = encoder_module.build_encoder(cfg, 16, one_device)
    ours = runner.bind(started(cfg, TrainStep.build(cfg, one_device)).params).features(images)
    before = runner.features({name: theirs[name] for name in runner.params}, images)
    assert same(ours, before) and np.ptp(ours.logits) > 0


@pytest.mark.parametrize("side", [3, 7, 10])
def test_learned_positions_are_resized_as_pillow_resizes_images(side):
    positions = np.random.default_rng(0).normal(size=(25, 6)).astype(np.float32)
    ours = np.asarray(init_from.resized(positions, side)).reshape(side, side, 6)
    for channel in range(6):
        image = Image.fromarray(positions[:, channel].reshape(5, 5))
        theirs = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(ours[..., channel], theirs, atol=2e-6)
    constant = init_from.resized(np.full((25, 2), [3.0, -1.5], np.float32), side)
    np.testing.assert_allclose(constant, np.full((side**2, 2), [3.0, -1.5]), rtol=1e-6)
    assert np.array_equal(init_from.resized(positions, 5), positions)


@pytest.mark.parametrize(("size", "devices"), [(12, ONE), (32, jax.devices())])
def test_another_image_size_changes_the_positions_only(supervised, source, size, devices):
    workdir, theirs = source
    data = {"image_size": size, "eval_resize": 32}
    cfg = changed(supervised, init={"checkpoint": workdir}, data=data)
    expected = init_from.resized(theirs["encoder"]["positions"], size // 4)
    assert expected.shape == ((size // 4) ** 2, 32)
    mesh = sharding.make_mesh(MeshConfig(fsdp=min(2, len(devices))), devices)
    encoder = started(cfg, TrainStep.build(cfg, mesh)).params["encoder"]
    np.testing.assert_allclose(encoder["positions"], expected, atol=1e-6)
    assert same(encoder | {"positions": 0}, theirs["encoder"] | {"positions": 0})


def test_fixed_positions_keep_their_relative_places(cfg):
    table = sincos2d(2, 2, 8, grid=4).reshape(2, 2, 8)  # centres of 2 patches on 4: 0.5 and 2.5
    np.testing.assert_allclose(table[:, :, 0], np.sin([[0.5, 2.5]] * 2), rtol=1e-6)
    np.testing.assert_allclose(table[:, :, 4], np.sin([[0.5] * 2, [2.5] * 2]), rtol=1e-6)
    assert np.array_equal(sincos2d(5, 5, 32, grid=5), sincos2d(5, 5, 32))
    # Of 3 x 3 patches where there was one, the middle one is where that was; through the model:
    cfg = changed(cfg, model={"positions": "sincos2d"})
    larger = changed(cfg, model={"position_grid": 5}, data={"image_size": 60, "eval_resize": 60})
    tables = []
    for c in (cfg, larger):
        vit = ViT(c.model, c.data, rngs=nnx.Rngs(0))
        size = c.data.image_size
        tables.append(vit.embed(np.zeros((1, size, size, 1), np.float32))[0])
        assert np.array_equal(tables[-1], layout.fixed_positions(c.model, c.data))  # as exported
    middle = tables[1].reshape(15, 15, 32)[1::3, 1::3].reshape(25, 32)
    np.testing.assert_allclose(middle, tables[0], atol=1e-5)


REFUSED = [  # of a run whose checkpoint has the defaults of `cfg`
    ({"model": {"width": 64}}, r"config\.model\.width: 32; 64 \(there; here\)"),
    ({"model": {"depth": 3}}, r"config\.model\.depth: 2; 3"),
    ({"model": {"mlp_dim": 96}}, r"config\.model\.mlp_dim: 64; 96"),
    ({"model": {"registers": 2}}, r"config\.model\.registers: 0; 2"),
    ({"model": {"heads": 4}}, r"config\.model\.heads: 2; 4"),
    ({"model": {"patch": 5}}, r"config\.model\.patch: 4; 5"),
    ({"model": {"pooling": "cls"}}, r"config\.model\.pooling: 'gap'; 'cls'"),
    ({"model": {"layer_scale": 0.1}}, r"config\.model\.layer_scale: 0\.0; 0\.1"),
    ({"model": {"gelu": "tanh"}}, r"config\.model\.gelu: 'exact'; 'tanh'"),
    ({"model": {"positions": "sincos2d"}}, r"config\.model\.positions: 'learned'; 'sincos2d'"),
    ({"data": {"channels": 3}}, r"config\.data\.channels: 1; 3"),
    ({"init": {"head": "keep"}, "data": {"num_classes": 31}}, "has 30 classes .* is 31"),
    ({"init": {"checkpoint": "/nowhere"}}, r"config\.init\.checkpoint: .* in /nowhere"),
]


def test_what_is_not_the_same_encoder_is_refused(supervised, source, one_device):
    for changes, message in REFUSED:
        cfg = changed(changed(supervised, init={"checkpoint": source[0]}), **changes)
        with pytest.raises(SetupError, match=message):
            started(cfg, TrainStep.build(cfg, one_device))


def test_what_is_not_an_encoder_is_refused(cfg, supervised, source, one_device, tmp_path):
    tokenizer = VQGANConfig(filters=4, multipliers=(1, 1), res_blocks=1, groups=2, code_dim=4)
    vqgan = changed(cfg, objective=VQGANObjectiveConfig(tokenizer=tokenizer))
    other = save(vqgan, tmp_path / "vqgan", random_state(vqgan, 7))
    mae = changed(cfg, objective=MAEConfig(decoder=cfg.objective.decoder))
    headless = save(mae, tmp_path / "mae", random_state(mae, 7))
    for base, workdir, head, message in (
        (supervised, other, "new", "objective 'vqgan', which trains a tokenizer and no encoder"),
        (supervised, headless, "keep", "objective 'mae', which trains no head of that kind"),
        (vqgan, source[0], "new", "objective 'vqgan' trains no encoder"),
    ):
        cfg = changed(base, init={"checkpoint": workdir, "head": head})
        with pytest.raises(SetupError, match=message):
            init_from.InitialState.open(cfg, TrainStep.build(cfg, one_device))


def test_fixed_positions_of_another_grid_are_refused_until_it_is_named(cfg, one_device, tmp_path):
    cfg = changed(cfg, model={"positions": "sincos2d"})
    workdir = save(cfg, tmp_path, random_state(cfg, 7))
    cfg = changed(cfg, init={"checkpoint": workdir}, data={"image_size": 24})
    step_fn = TrainStep.build(cfg, one_device)
    with pytest.raises(SetupError, match=r"config\.model\.position_grid: 5; 6"):
        init_from.InitialState.open(cfg, step_fn)
    init_from.InitialState.open(changed(cfg, model={"position_grid": 5}), step_fn)


def test_a_fine_tuned_run_resumes_without_the_checkpoint_it_began_from(
    supervised, source, one_device, tmp_path
):
    workdir, theirs = source
    init = {"checkpoint": workdir, "head": "keep"}
    cfg = changed(supervised, init=init, optim={"layer_decay": 0.5, "lr": 1e-5})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cfg, whole, stop_at=4, devices=ONE)
    train(cfg, parts, stop_at=2, devices=ONE)
    shutil.rmtree(workdir)
    train(cfg, parts, stop_at=4, devices=ONE)
    prog = TrainStep.build(cfg, one_device)
    ends = [restored(d, 4, prog.state)[0] for d in (whole, parts)]
    assert same(*ends)
    kernel = [p["encoder"]["patches"]["kernel"] for p in (ends[0].params, theirs)]
    assert 0 < np.abs(kernel[0] - kernel[1]).max() < 1e-4
    other = changed(cfg, init={"checkpoint": f"{workdir}@7"})
    with pytest.raises(SetupError, match=r"another config: config\.init\.checkpoint: "):
        train(other, parts, devices=ONE)
    with pytest.raises(SetupError, match="There is no checkpoint in"):
        train(cfg, tmp_path / "late", devices=ONE)


def test_eight_devices_start_and_step_as_one(supervised, source, one_device):
    init = {"checkpoint": source[0], "head": "keep"}
    cfg = changed(supervised, init=init, data={"image_size": 24}, optim={"layer_decay": 0.5})
    losses = []
    for mesh in (one_device, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        prog = TrainStep.build(cfg, mesh)
        state, batch = started(cfg, prog), sharding.put(make_batch(cfg), prog.batch)
        for _ in range(2):
            state, metrics = prog.step(state, batch, make_frozen(cfg))
        losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
