"""Schedule, weight decay, LAMB and learning rates by layer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import make_batch, train_on

from supmim_jax import optim
from supmim_jax.config import changed
from supmim_jax.sharding import path_name
from supmim_jax.train_step import TrainStep


def test_weight_decay_is_on_matrices_only(cfg, one_device):
    params = TrainStep.build(cfg, one_device).state.params
    flat = jax.tree_util.tree_leaves_with_path(optim.decay_mask(params))
    decayed = {path_name(path) for path, on in flat if on}
    assert "encoder/transformer/blocks/qkv/kernel" in decayed and "head/kernel" in decayed
    assert all(path.endswith("/kernel") for path in decayed)
    assert len(decayed) == 2 * 4 + 1 + 1 + 2


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_the_learning_rate_warms_up_and_decays(cfg, one_device, name):
    fields = {"name": name, "lr": 0.1, "final_lr": 0.01, "warmup_epochs": 1}
    cfg = changed(cfg, epochs=10, optim=fields)  # 4 steps of 40
    rate = optim.schedule(cfg)
    np.testing.assert_allclose([rate(s) for s in (0, 2, 4, 40)], [0, 0.05, 0.1, 0.01], rtol=1e-5)
    np.testing.assert_allclose(rate(22), (0.1 + 0.01) / 2, rtol=1e-5)
    _, found = train_on(cfg, one_device, [make_batch(cfg)] * 2)
    np.testing.assert_allclose([x["learning_rate"] for x in found], [rate(0), rate(1)], rtol=1e-6)


def test_a_rate_for_each_epoch_is_timms(cfg):
    """CosineLRScheduler(t_in_epochs) of timm: warm-up by epochs, then the cosine of all of them."""
    fields = {"lr": 0.1, "final_lr": 0.01, "warmup_epochs": 2, "warmup_lr": 0.02}
    cfg = changed(cfg, epochs=10, optim=fields | {"schedule": "per_epoch"})  # of 4 steps each
    rate = optim.schedule(cfg)
    cosine = [0.01 + 0.09 * (1 + np.cos(np.pi * epoch / 10)) / 2 for epoch in range(10)]
    expected = [0.02, 0.06, *cosine[2:]]
    np.testing.assert_allclose([rate(s) for s in range(40)], np.repeat(expected, 4), rtol=1e-5)
    rate = optim.schedule(changed(cfg, optim={"schedule": "per_step"}))
    np.testing.assert_allclose([rate(s) for s in (0, 4, 8)], [0.02, 0.06, 0.1], rtol=1e-5)


def test_a_warm_up_that_is_a_factor_of_the_cosine_is_scenics(cfg):
    fields = {"lr": 0.1, "warmup_epochs": 2.5, "schedule": "product"}
    rate = optim.schedule(changed(cfg, epochs=10, optim=fields))  # 10 steps of 40
    expected = [0.05 * (1 + np.cos(np.pi * s / 40)) * min(s / 10, 1) for s in range(40)]
    np.testing.assert_allclose([rate(s) for s in range(40)], expected, rtol=1e-5, atol=1e-8)


def test_maes_code_also_decays_tokens_and_scenics_all(cfg, one_device):
    cfg = changed(cfg, model={"pooling": "cls", "registers": 2})
    params = TrainStep.build(cfg, one_device).state.params
    masks = (optim.decay_mask(params, on) for on in ("matrices", "matrices_and_tokens", "all"))
    matrices, tokens, everything = (jax.tree_util.tree_leaves_with_path(mask) for mask in masks)
    added = {path_name(path) for (path, a), (_, b) in zip(matrices, tokens) if a != b}
    assert added == {"encoder/cls", "encoder/registers", "mask_embedding"}
    assert all(on for _, on in everything)


@pytest.mark.parametrize("decay_on", ["matrices", "all"])
def test_what_decays_moves_without_a_gradient(cfg, decay_on):
    """AdamW's step of a zero gradient is -lr * weight_decay * parameter, or nothing."""
    cfg = changed(cfg, optim={"weight_decay": 0.1, "decay_on": decay_on})
    params = {"qkv": {"kernel": jnp.ones(3), "bias": jnp.ones(3)}, "positions": jnp.ones(3)}
    made = optim.make(cfg)
    zeros = jax.tree.map(jnp.zeros_like, params)
    state = made.init(params)
    _, state = made.update(zeros, state, params)  # the warm-up begins at 0
    moved, _ = made.update(zeros, state, params)
    step = -0.1 * optim.schedule(cfg)(1)
    np.testing.assert_allclose(moved["qkv"]["kernel"], step, rtol=1e-5)
    expected = step if decay_on == "all" else 0.0
    np.testing.assert_allclose([*moved["qkv"]["bias"], *moved["positions"]], expected, rtol=1e-5)


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


SCALES = {  # decay 0.5, depth 2: 0.5^(depth + 1 - layer)
    "encoder/patches/kernel": 0.125,
    "encoder/patches/bias": 0.125,
    "encoder/positions": 0.125,
    "encoder/registers": 0.125,
    "encoder/cls": 0.125,
    "mask_embedding": 0.125,
    "encoder/norm/scale": 1.0,
    "head/kernel": 1.0,
    "decoder/embed/kernel": 1.0,
    "decoder/transformer/blocks/fc1/kernel": 1.0,
}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_updates_fall_by_the_decay_from_layer_to_layer(cfg, one_device, name):
    """Adam's first step is lr * sign(g); with it, and with weight decay, each layer's share."""
    fixed = {"name": name, "warmup_epochs": 0.0, "clip": 0.0}
    cfg = changed(cfg, model={"pooling": "cls", "registers": 2}, optim=fixed)
    like = TrainStep.build(cfg, one_device).state.params
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda x: random.normal(size=(2,) * x.ndim).astype(np.float32), like)
    grads = jax.tree.map(lambda x: 1e-3 * random.choice([-1.0, 1.0], x.shape), params)

    def updates(**fields) -> dict[str, np.ndarray]:
        made = optim.make(changed(cfg, optim=fields))
        found, _ = made.update(grads, made.init(params), params)
        flat = jax.tree_util.tree_leaves_with_path(found)
        return {path_name(path): np.asarray(x) for path, x in flat}

    decayed, head_only, even = updates(layer_decay=0.5), updates(layer_decay=0.0), updates()
    assert set(SCALES) <= set(even)
    for path, update in even.items():
        block = path.startswith("encoder/transformer/blocks/")
        layers = np.float32([0.25, 0.5]).reshape(2, *[1] * (update.ndim - 1))
        expected = layers if block else np.float32(SCALES.get(path, 1.0))
        np.testing.assert_array_equal(decayed[path], update * expected, path)
        np.testing.assert_array_equal(head_only[path], update * (expected == 1.0), path)
    if name == "adamw":
        sign = np.sign(grads["encoder"]["patches"]["kernel"])
        wanted = sign + cfg.optim.weight_decay * params["encoder"]["patches"]["kernel"]
        wanted = -cfg.optim.lr * 0.125 * wanted
        np.testing.assert_allclose(decayed["encoder/patches/kernel"], wanted, rtol=1e-4)


def test_without_layer_decay_the_optimizer_state_is_that_of_older_checkpoints(cfg):
    params = {"head": {"kernel": jnp.zeros((2, 2))}}
    state = optim.make(cfg).init(params)
    assert len(state) == 5 and isinstance(state[-1], optax.ScaleByScheduleState)
