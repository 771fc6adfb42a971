"""The step on any mesh, the sharding table, and inference without overhead."""

import itertools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import save_initial, train_on

from supmim_jax import encoder, sharding
from supmim_jax.batch import Batch
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import MeshConfig, changed
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import ConfigError
from supmim_jax.models import masking
from supmim_jax.train_step import TrainStep

MESHES = [MeshConfig(data=8), MeshConfig(data=4, fsdp=2), MeshConfig(data=2, fsdp=2, tensor=2)]


def run(cfg, mesh, steps: int):
    """Losses and ids of every step on this mesh."""
    batches = list(itertools.islice(Dataset.open(cfg).train(mesh), steps))
    _, metrics = train_on(cfg, mesh, batches)
    losses = [[x[k] for k in ("loss", "ce", "mim", "grad_norm")] for x in metrics]
    return np.array(losses), np.array([batch.id for batch in batches])


@pytest.fixture
def twenty_steps(cfg):
    return changed(cfg, epochs=5, optim={"warmup_epochs": 1})


@pytest.fixture(scope="module")
def on_one_device():
    return {}


@pytest.mark.parametrize(
    ("mesh", "encoder_input"),
    [
        (MESHES[-1], "masked"),
        *(pytest.param(mesh, "masked", marks=pytest.mark.slow) for mesh in MESHES[:-1]),
        (MESHES[-1], "visible"),
    ],
    ids=lambda x: x if isinstance(x, str) else f"{x.data}x{x.fsdp}x{x.tensor}",
)
def test_eight_devices_give_the_losses_of_one(
    twenty_steps, one_device, on_one_device, mesh, encoder_input
):
    cfg = changed(twenty_steps, objective={"encoder_input": encoder_input})
    if encoder_input not in on_one_device:
        on_one_device[encoder_input] = run(cfg, one_device, 20)
    losses, ids = on_one_device[encoder_input]
    sharded_losses, sharded_ids = run(cfg, sharding.make_mesh(mesh), 20)
    assert (ids == sharded_ids).all() and len(ids) == 20
    np.testing.assert_allclose(sharded_losses, losses, rtol=1e-5)


def test_only_data_crosses_from_slice_to_slice(monkeypatch, twenty_steps, one_device):
    odd_and_even = [jax.devices()[1::2], jax.devices()[::2]]
    with monkeypatch.context() as patched:
        patched.setattr(sharding, "by_slice", lambda devices, slices: odd_and_even)
        mesh = sharding.make_mesh(MeshConfig(fsdp=2, slices=2))
        with pytest.raises(ConfigError, match="slices is 2, which does not divide data = 1"):
            sharding.make_mesh(MeshConfig(fsdp=8, slices=2))
    assert dict(mesh.shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    for rows, group in zip((mesh.devices[:2], mesh.devices[2:]), odd_and_even, strict=True):
        assert set(rows.flat) == set(group)
    found, expected = run(twenty_steps, mesh, 3)[0], run(twenty_steps, one_device, 3)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_slices_are_told_by_their_devices():
    def devices(*slices: int, platform: str = "tpu"):
        return [types.SimpleNamespace(slice_index=i, platform=platform) for i in slices]

    found = sharding.by_slice(devices(1, 0, 1, 0), 2)
    assert [[d.slice_index for d in group] for group in found] == [[0, 0], [1, 1]]
    assert len(sharding.by_slice(devices(0, 0), 1)) == 1
    assert len(sharding.by_slice(devices(0, 1, platform="gpu"), 1)) == 1  # hosts, one run
    for slices, given in ((1, devices(0, 1)), (3, devices(0, 1, 2, 2)), (2, jax.devices())):
        with pytest.raises(ConfigError, match=f"slices is {slices}, but the {len(given)} devices"):
            sharding.by_slice(given, slices)


@pytest.mark.parametrize("form", ["random", "block"])
def test_masks_are_the_same_on_any_mesh(form):
    ids = jnp.arange(16) * 7

    def sample(ids):
        return masking.sample(form, 0.5, 5, jax.random.key(3), ids).masked

    alone = jax.jit(sample)(ids)
    rows = jax.NamedSharding(sharding.make_mesh(MESHES[1]), sharding.BATCH)
    assert (jax.jit(sample)(jax.device_put(ids, rows)) == alone).all()


def test_every_parameter_has_a_rule_and_large_ones_are_sharded(cfg):
    mesh = sharding.make_mesh(MESHES[2])
    for changes in (
        {"pooling": "cls", "layer_scale": 0.1, "registers": 2},
        {"positions": "sincos2d"},
    ):
        state = TrainStep.build(changed(cfg, model=changes), mesh).state
        for path, x in jax.tree_util.tree_leaves_with_path(state):
            spec = x.sharding.spec
            assert len(spec) in (0, x.ndim) or not any(spec[x.ndim :]), (path, spec)
            used = [axis for axis in spec if axis]
            assert set(used) <= set(mesh.axis_names)
            if x.ndim >= 2 and "kernel" in str(path[-1]):
                assert "fsdp" in used, path


def test_what_does_not_fit_the_mesh_is_named(cfg):
    with pytest.raises(ConfigError, match=r"config\.batch_size is 12, which the 8 batch shards"):
        sharding.run_mesh(changed(cfg, batch_size=12, mesh=MESHES[0]))
    with pytest.raises(ConfigError, match=r"data=3, fsdp=1, tensor=1, but there are 8 devices"):
        sharding.make_mesh(MeshConfig(data=3))
    with pytest.raises(ConfigError, match=r"config\.mesh\.fsdp is 8.*does not divide the 30 of"):
        mesh = sharding.make_mesh(MeshConfig(fsdp=8))
        sharding.spec("x/patches/kernel", (16, 30), mesh)
    with pytest.raises(ConfigError, match=r"No rule of sharding\.RULES names the parameter x/new"):
        sharding.spec("x/new", (3,), sharding.make_mesh(MeshConfig()))


def canonical(text: str) -> str:
    """HLO text without names of the module, source locations (and their tables), fingerprints."""
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    tables = r"^(FileNames|FunctionNames|FileLocations|StackFrames|\d+ .*)\n"
    text = re.sub(tables, "", text, flags=re.MULTILINE)
    return re.sub(r"HloModule [^,]*", "HloModule m", text)


def test_inference_of_supmim_is_the_program_of_supervised(cfg, supervised, one_device, tmp_path):
    """From two checkpoints, one of each objective: the same parameters' shapes, the same HLO."""
    programs = []
    for run_cfg in (cfg, supervised):
        saved = Checkpoint.open(save_initial(run_cfg, tmp_path / run_cfg.objective.name))
        runner = encoder.build_encoder(saved.config, 16, one_device)
        params = saved.restore_params(runner.params)
        assert set(params) == {"encoder", "head"}
        lowered = runner.features.lower(params, runner.images)
        programs.append(canonical(lowered.compile().as_text()))
    assert "fusion" in programs[0] and "metadata" not in programs[0]
    assert programs[0] == programs[1]
    other = encoder.build_encoder(changed(cfg, model={"mlp_dim": 96}), 16, one_device)
    text = other.features.lower(other.params, other.images).compile().as_text()
    assert canonical(text) != programs[0]


def test_building_touches_no_device(cfg, one_device):
    live = {id(x) for x in jax.live_arrays()}
    TrainStep.build(cfg, one_device)
    encoder.build_encoder(cfg, 16, one_device)
    assert not [x for x in jax.live_arrays() if id(x) not in live and x.size > 1]
    assert isinstance(TrainStep.build(cfg, one_device).batch, Batch)
