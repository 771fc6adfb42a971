"""Saving and strict restoring."""

import shutil

import jax
import numpy as np
import pytest
from conftest import make_batch, make_frozen, random_state, restored, same, save

from supmim_jax import checkpoint, encoder, sharding
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import MeshConfig, changed
from supmim_jax.errors import SetupError
from supmim_jax.train_step import TrainStep


@pytest.fixture
def state(cfg):
    return random_state(cfg, 1)


@pytest.fixture
def saved(cfg, state, tmp_path):
    """The checkpoint that holds the state."""
    return Checkpoint.open(save(cfg, tmp_path, state))


def test_a_state_comes_back_bit_for_bit_on_any_mesh(cfg, state, saved, one_device):
    assert saved.run == checkpoint.BEGIN | {"position": 16, "seconds": 1.5} and saved.config == cfg
    for mesh in (one_device, sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))):
        loaded = saved.restore_state(TrainStep.build(cfg, mesh).state)
        assert same(loaded, state)
    kernel = loaded.params["encoder"]["transformer"]["blocks"]["qkv"]["kernel"]
    assert kernel.sharding.spec == jax.P(None, "fsdp", "tensor")


def test_donating_the_state_right_after_a_save_does_not_change_it(cfg, one_device, tmp_path):
    """The step reuses the state's buffers while the save still runs in the background."""
    built = TrainStep.build(cfg, one_device)
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
    other = changed(cfg, model=changes)
    with pytest.raises(SetupError, match=message) as error:
        saved.restore_state(TrainStep.build(other, one_device).state)
    assert "Use the config that is saved beside it" in str(error.value)
    runner = encoder.build_encoder(other, 16, one_device)
    with pytest.raises(SetupError, match=message.replace("params/", "")):
        saved.restore_params(runner.params)


def test_a_misspelt_or_missing_subtree_is_refused(state, saved):
    like = {"encodr": state.params["encoder"]}
    with pytest.raises(SetupError, match="has no params/encodr; it has params/decoder, params/enc"):
        saved.restore_params(like)


def test_the_encoder_alone_is_restored_exactly(cfg, state, saved, one_device):
    params = saved.restore_params(encoder.build_encoder(cfg, 16, one_device).params)
    assert same(params, {name: state.params[name] for name in ("encoder", "head")})


def test_missing_checkpoints_and_steps_are_named(saved, tmp_path):
    root = str(saved.workdir)
    assert checkpoint.locate(f"{root}@1") == checkpoint.locate(root)
    with pytest.raises(SetupError, match="has no step 7; it has 1"):
        checkpoint.locate(f"{root}@7")
    with pytest.raises(SetupError, match="There is no checkpoint in"):
        checkpoint.locate(str(tmp_path / "elsewhere"))
    with pytest.raises(SetupError, match=rf"Did you mean {root}@1\?"):
        checkpoint.locate(f"{root}/checkpoints/1")


def test_a_step_that_is_being_written_does_not_exist_yet(saved):
    directory = saved.directory.parent
    shutil.copytree(directory / "1", directory / "5.orbax-checkpoint-tmp-17")
    root = str(directory.parent)
    assert checkpoint.locate(root) == directory / "1"
    with pytest.raises(SetupError, match=rf"{directory} has no step 5; it has 1"):
        checkpoint.locate(f"{root}@5")
    shutil.rmtree(directory / "1")
    with pytest.raises(SetupError, match=f"There is no checkpoint in {directory}"):
        checkpoint.locate(root)
