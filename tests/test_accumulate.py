"""Micro-batches: the step of the large batch, whatever their number and the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ONE, make_batch, train_on

from supmim_jax import sharding, train_step
from supmim_jax.config import (
    ClassificationConfig,
    Config,
    MAEConfig,
    MeshConfig,
    SupervisedConfig,
    SupMIMConfig,
    changed,
)
from supmim_jax.errors import ConfigError

MIXED = ClassificationConfig(mixup=0.5, cutmix=1.0, label_smoothing=0.1)


def two_steps(cfg: Config, mesh, parts: int) -> dict[str, float]:
    """Metrics after two steps with some padding in the batch, and a sum over the parameters."""
    optim = {"accumulate": parts, "warmup_epochs": 0.0}
    cfg, batch = changed(cfg, model={"drop_path": 0.0, "depth": 1}, optim=optim), make_batch(cfg)
    batch.weight[[1, 2, 3, 7]] = 0.0
    state, (_, found) = train_on(cfg, mesh, [batch] * 2)
    return found | {"params": float(sum(jnp.abs(x).sum() for x in jax.tree.leaves(state.params)))}


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(SupervisedConfig(), marks=pytest.mark.slow),
        SupMIMConfig(classification=MIXED),
        pytest.param(MAEConfig(), marks=pytest.mark.slow),
    ],
    ids=lambda objective: objective.name,
)
def test_micro_batches_give_the_step_of_the_large_batch(cfg, one_device, objective):
    cfg = changed(cfg, objective=objective)
    whole = two_steps(cfg, one_device, 1)
    assert two_steps(cfg, one_device, 2) == pytest.approx(whole, rel=1e-5)
    four = sharding.make_mesh(MeshConfig(data=2, fsdp=2), jax.devices()[:4])
    assert two_steps(cfg, four, 4) == pytest.approx(whole, rel=1e-5)


def test_every_example_is_in_one_micro_batch_with_its_mirror(cfg):
    batch = make_batch(changed(cfg, batch_size=24))
    dealt = train_step.micro_batches(batch, 3)
    assert dealt.micro.tolist() == [0, 1, 2]
    assert sorted(dealt.id.reshape(-1).tolist()) == list(range(24))
    for ids in dealt.id:
        assert (ids + ids[::-1] == 23).all()
    neighbours = np.sort(np.asarray(dealt.id).T // 3, axis=1)
    assert (neighbours == np.arange(8)[:, None]).all()  # so no row leaves its device


def test_droppath_is_drawn_for_each_micro_batch(cfg, supervised):
    key = jax.random.key(0)
    batch = make_batch(supervised)
    assert batch.row_key(key) is key
    keys = [batch.replace(micro=jnp.int32(i)).row_key(key) for i in range(2)]
    assert not (jax.random.key_data(keys[0]) == jax.random.key_data(keys[1])).all()


def test_what_does_not_divide_is_named(cfg):
    def build(parts: int, **changes):
        return sharding.run_mesh(changed(cfg, optim={"accumulate": parts}, **changes), ONE)

    with pytest.raises(ConfigError, match=r"in 3 micro-batches.*Take 15 or 18"):
        build(3)
    with pytest.raises(ConfigError, match=r"accumulate is 4.*micro-batches of 3 examples"):
        build(4, batch_size=12)
