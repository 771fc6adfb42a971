"""Schedule, weight decay and LAMB."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch, make_frozen

from supmim_jax import optim, program
from supmim_jax.config import OptimConfig


def test_weight_decay_is_on_matrices_only(cfg, one_device):
    params = program.build(cfg, one_device).state.params
    flat = jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
    decayed = {optim.path_name(path) for path, on in flat if on}
    assert "encoder/transformer/blocks/qkv/kernel" in decayed and "head/kernel" in decayed
    assert all(path.endswith("/kernel") for path in decayed)
    assert len(decayed) == 2 * 4 + 1 + 1 + 2


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_learning_rate_warms_up_and_decays(cfg, one_device, name):
    changed = OptimConfig(name=name, lr=0.1, final_lr=0.01, warmup_epochs=1)
    cfg = dataclasses.replace(cfg, epochs=10, optim=changed)  # 4 steps of 40
    rate = optim.schedule(cfg)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 40)], [0, 0.05, 0.1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(rate(22), (0.1 + 0.01) / 2, rtol=1e-5)
    built = program.build(cfg, one_device)
    state = built.init(jax.random.key(0))
    for step in range(2):
        state, metrics = built.step(state, make_batch(cfg), make_frozen(cfg))
        np.testing.assert_allclose(metrics["learning_rate"], rate(step), rtol=1e-6)


def test_lamb_treats_stacked_layers_as_layers():
    """One stacked array of two layers moves as optax's LAMB moves two arrays; biases as Adam's."""
    random = np.random.default_rng(0)
    kernels = jnp.asarray(random.normal(size=(2, 3, 4)) * np.array([1.0, 100.0])[:, None, None])
    grads = jnp.asarray(random.normal(size=(2, 3, 4)))
    ours = optax.chain(optax.scale_by_adam(eps=1e-6), optim.layer_trust_ratio())
    params = {"blocks": {"kernel": kernels, "bias": kernels}}
    gradient = {"blocks": {"kernel": grads, "bias": grads}}
    moved, _ = ours.update(gradient, ours.init(params), params)
    apart = optax.lamb(-1.0)
    layers, layer_grads = ({str(i): x[i] for i in range(2)} for x in (kernels, grads))
    expected, _ = apart.update(layer_grads, apart.init(layers), layers)
    for i in range(2):
        np.testing.assert_allclose(moved["blocks"]["kernel"][i], expected[str(i)], rtol=1e-5)
    np.testing.assert_allclose(moved["blocks"]["bias"], np.sign(grads), rtol=1e-4)
