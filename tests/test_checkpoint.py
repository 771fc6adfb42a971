"""Saving and strict restoring."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from conftest import make_batch, make_frozen, restored

from supmim_jax import checkpoint, encoder, sharding, train_step
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError


@pytest.fixture
def saved(cfg, one_device, tmp_path):
    """A program, a state of random numbers at step 1, and the checkpoints that hold it."""
    built = train_step.build(cfg, one_device)
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: random.normal(size=x.shape), built.state).replace(step=1)
    state = sharding.put(state, built.state)
    checkpoints = checkpoint.Checkpoints(tmp_path, cfg.checkpoint)
    checkpoints.save(state, cfg, {"position": 16, "seconds": 1.5})
    checkpoints.close()
    return built, state, checkpoint.Checkpoints(tmp_path, cfg.checkpoint)


def same(a, b) -> bool:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def test_a_state_comes_back_bit_for_bit_on_any_mesh(cfg, saved):
    built, state, checkpoints = saved
    loaded, run = restored(checkpoints.workdir, 1, built.state)
    assert same(loaded, state) and run == checkpoint.BEGIN | {"position": 16, "seconds": 1.5}
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    other = train_step.build(cfg, mesh)
    loaded, _ = restored(checkpoints.workdir, 1, other.state)
    assert same(loaded, state)
    kernel = loaded.params["encoder"]["transformer"]["blocks"]["qkv"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")
    assert Checkpoint.open(str(checkpoints.directory.parent)).config == cfg


def test_donating_the_state_right_after_a_save_does_not_change_it(cfg, one_device, tmp_path):
    """The step reuses the state's buffers while the save still runs in the background."""
    built = train_step.build(cfg, one_device)
    state = built.init(jax.random.key(0))
    before = jax.tree.map(np.array, checkpoint.plain(state))
    checkpoints = checkpoint.Checkpoints(tmp_path, cfg.checkpoint)
    checkpoints.save(state, cfg, {})
    for _ in range(5):
        state, _ = built.step(state, make_batch(cfg), make_frozen(cfg))
    checkpoints.close()
    loaded, _ = restored(tmp_path, 0, built.state)
    assert same(jax.tree.map(np.array, checkpoint.plain(loaded)), before)
    assert not same(loaded.params, state.params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth": 3}, r"blocks/fc1/bias is float32\[2, 64\] in the checkpoint, float32\[3, 64\]"),
        ({"width": 64}, r"float32\[32\] in the checkpoint, float32\[64\] in the model"),
        ({"pooling": "cls"}, r"params/encoder/cls is not in the checkpoint, float32\[32\]"),
        (
            {"positions": "sincos2d"},
            r"encoder/positions is float32\[25, 32\] in the checkpoint, not in the model",
        ),
    ],
)
def test_another_architecture_is_refused(cfg, saved, one_device, changes, message):
    _, _, checkpoints = saved
    other = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **changes))
    with pytest.raises(SetupError, match=message) as error:
        restored(checkpoints.workdir, 1, train_step.build(other, one_device).state)
    assert "Use the config that is saved beside it" in str(error.value)
    runner = encoder.build_encoder(other, 16, one_device)
    with pytest.raises(SetupError, match=message.replace("params/", "")):
        Checkpoint.read(checkpoints.directory / "1").restore_params(runner.params)


def test_a_misspelt_or_missing_subtree_is_refused(saved, one_device):
    built, _, checkpoints = saved
    like = {"encodr": built.state.params["encoder"]}
    with pytest.raises(SetupError, match="has no params/encodr; it has params/decoder, params/enc"):
        Checkpoint.read(checkpoints.directory / "1").restore_params(like)


def test_the_encoder_alone_is_restored_exactly(cfg, saved, one_device):
    _, state, checkpoints = saved
    runner = encoder.build_encoder(cfg, 16, one_device)
    params = Checkpoint.read(checkpoints.directory / "1").restore_params(runner.params)
    assert same(params, {name: state.params[name] for name in ("encoder", "head")})


def test_missing_checkpoints_and_steps_are_named(saved, tmp_path):
    root = str(saved[2].directory.parent)
    assert checkpoint.locate(f"{root}@1") == checkpoint.locate(root)
    with pytest.raises(SetupError, match="has no step 7; it has 1"):
        checkpoint.locate(f"{root}@7")
    with pytest.raises(SetupError, match="There is no checkpoint in"):
        checkpoint.locate(str(tmp_path / "elsewhere"))


def test_a_step_that_is_being_written_does_not_exist_yet(saved):
    directory = saved[2].directory
    shutil.copytree(directory / "1", directory / "5.orbax-checkpoint-tmp-17")
    root = str(directory.parent)
    assert checkpoint.locate(root) == directory / "1"
    with pytest.raises(SetupError, match=rf"{directory} has no step 5; it has 1"):
        checkpoint.locate(f"{root}@5")
    shutil.rmtree(directory / "1")
    with pytest.raises(SetupError, match=f"There is no checkpoint in {directory}"):
        checkpoint.locate(root)
