"""CMAE: its three losses by hand, the momentum branch, and what the position task can see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import make_batch, train_on
from flax import nnx

from supmim_jax import sharding
from supmim_jax.config import (
    CMAEConfig,
    ContrastiveConfig,
    DecoderConfig,
    EvalConfig,
    MAEConfig,
    MeshConfig,
    OptimConfig,
    PositionConfig,
    changed,
)
from supmim_jax.models.vit import pixels
from supmim_jax.objectives import losses
from supmim_jax.objectives.cmae import CMAE, MomentumBranch
from supmim_jax.objectives.mae import MAE
from supmim_jax.train_step import TrainStep

OFF = ContrastiveConfig(weight=0.0)
NOWHERE = PositionConfig(weight=0.0)
DECODER = DecoderConfig(depth=1, width=16, mlp_dim=32, heads=2)
KEY = jax.random.key(3)


@pytest.fixture
def cmae(cfg):
    """Both tasks on, momentum fast enough to be seen, learning rate from the first step on."""
    contrastive = ContrastiveConfig(momentum=0.9)
    return changed(
        cfg,
        model={"drop_path": 0.0, "depth": 1},
        objective=CMAEConfig(mask_ratio=0.6, decoder=DECODER, contrastive=contrastive),
        optim=OptimConfig(warmup_epochs=0),
        eval=EvalConfig(which=("knn",), batch_size=64),
    )


def with_tasks(cfg, **objective):
    return changed(cfg, objective=objective)


def model(cfg):
    return CMAE(cfg, rngs=nnx.Rngs(0))


def close(a, b, **tolerance) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def test_info_nce_by_hand():
    random = np.random.default_rng(0)
    queries, keys = random.normal(size=(2, 5, 3))
    keys[0] = 2.0 * queries[0]
    weight = np.array([1.0, 1.0, 1.0, 0.0, 1.0])
    found, hits = losses.info_nce(jnp.array(queries), jnp.array(keys), 0.5, jnp.array(weight))
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (queries, keys)]
    similarity = unit[0] @ unit[1].T / 0.5
    for i in (0, 1, 2, 4):
        among = similarity[i, weight > 0]
        np.testing.assert_allclose(found[i], np.log(np.exp(among).sum()) - similarity[i, i], 1e-5)
        assert bool(hits[i]) == (similarity[i, i] == among.max())
    assert found[3] == 0.0 and bool(hits[0])


def test_without_its_tasks_it_is_mae(cmae):
    cfg = with_tasks(cmae, contrastive=OFF, position=NOWHERE)
    mae = changed(cfg, objective=MAEConfig(mask_ratio=0.6, decoder=DECODER))
    assert cfg.objective.crops == 1
    batch = make_batch(cfg)
    other, _ = MAE(mae, rngs=nnx.Rngs(0)).loss(batch, KEY)
    found, terms = model(cfg).loss(batch, KEY)
    assert found == other and set(terms) == {"loss", "reconstruction"}


def test_reconstruction_is_the_sum_over_views_with_one_mask(cmae):
    cfg = with_tasks(cmae, position=NOWHERE)
    single = with_tasks(cmae, contrastive=OFF, position=NOWHERE)
    batch = make_batch(cfg)
    _, terms = model(cfg).loss(batch, KEY)
    views = [batch.replace(views=(view,)) for view in batch.views]
    each = [model(single).loss(view, KEY)[0] for view in views]
    np.testing.assert_allclose(terms["reconstruction"], sum(each), rtol=1e-6)
    assert each[0] != each[1]


def test_the_sum_and_the_contrastive_term_by_hand(cmae):
    cfg = with_tasks(cmae, contrastive=ContrastiveConfig(weight=0.3, temperature=0.5))
    subject, batch = model(cfg), make_batch(cfg)
    loss, terms = subject.loss(batch, KEY)
    total = terms["reconstruction"] + terms["position"] + 0.3 * terms["contrastive"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)

    mask = subject.mask(jax.random.split(KEY)[1], batch.id)
    queries, keys = [], []
    for view in map(pixels, batch.views):
        (tokens,) = subject.encoder.encode((subject.embed_kept(view, mask),))
        queries.append(subject.predictor(subject.projector(tokens.mean(1))))
        (tokens,) = subject.encoder.encode((subject.encoder.embed(view, visible=mask),))
        keys.append(subject.projector(tokens.mean(1)))  # the branch begins as a copy
    unit = [[x / np.linalg.norm(x, axis=1, keepdims=True) for x in xs] for xs in (queries, keys)]
    by_hand = 0.0
    for query, key in ((unit[0][0], unit[1][1]), (unit[0][1], unit[1][0])):
        similarity = query @ key.T / 0.5
        by_hand += np.mean(np.log(np.exp(similarity).sum(1)) - np.diag(similarity))
    np.testing.assert_allclose(terms["contrastive"], by_hand, rtol=1e-5)


def test_the_position_term_by_hand(cmae):
    cfg = with_tasks(cmae, contrastive=OFF)
    subject, batch = model(cfg), make_batch(cfg)
    mask = subject.mask(jax.random.split(KEY)[1], batch.id)
    assert (mask.keep.shape[1], subject.asked(mask)) == (10, 8)  # of 25 patches
    _, terms = subject.loss(batch, KEY)
    (tokens,) = subject.encoder.encode((subject.embed_kept(pixels(batch.views[0]), mask),))
    logits, places = np.asarray(subject.locator(tokens))[:, :8], np.asarray(mask.keep)[:, :8]
    own = np.take_along_axis(logits, places[..., None], 2)[..., 0]
    by_hand = (np.log(np.exp(logits).sum(-1)) - own).mean()
    np.testing.assert_allclose(terms["position"], by_hand, rtol=1e-5)
    hits = logits.argmax(-1) == places
    np.testing.assert_allclose(terms["position_accuracy"], hits.mean(), rtol=1e-6)


@pytest.mark.parametrize("leak_free", [True, False])
@pytest.mark.parametrize("pooling", ["gap", "cls"])
def test_what_enters_without_its_place_cannot_tell_it(cmae, leak_free, pooling):
    cfg = with_tasks(cmae, contrastive=OFF, position=PositionConfig(leak_free=leak_free))
    cfg = changed(cfg, model={"pooling": pooling})
    subject, batch = model(cfg), make_batch(cfg)
    mask = subject.mask(KEY, batch.id)
    count = subject.asked(mask)
    assert count == (8 if leak_free else 10)
    one = jax.tree.map(lambda x: x[:1], mask)

    def logits():
        inputs = (subject.embed_kept(pixels(batch.views[0][:1]), one),)
        (tokens,) = subject.encoder.encode(inputs)
        return np.asarray(subject.locator(tokens[:, subject.encoder.prefix :])[:, :count])

    before = logits()
    places = subject.encoder.positions
    asked = one.keep[0, :count]
    places[...] = places[...].at[asked].add(jnp.arange(1.0, 1.0 + count)[:, None])
    assert np.array_equal(logits(), before) == leak_free


def test_the_momentum_branch_follows_and_gets_no_gradient(cmae, one_device):
    built = TrainStep.build(cmae, one_device)
    state = built.init(jax.random.key(0))
    slow = None
    for step in range(3):
        fast = jax.tree.map(np.asarray, {k: state.params[k] for k in ("encoder", "projector")})
        state, _ = built.step(state, make_batch(cmae, step), {})
        found = jax.tree.map(np.asarray, state.moving["momentum"])
        assert found.pop("steps") == step + 1
        slow = fast if slow is None else jax.tree.map(lambda s, f: 0.9 * s + 0.1 * f, slow, fast)
        close(found, slow, rtol=1e-5, atol=1e-7)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found, fast)))]
    assert max(moved) > 1e-4

    def loss(moving):
        return nnx.merge(built.graph, state.params, moving, {}).loss(make_batch(cmae), KEY)[0]

    slopes = jax.jit(jax.grad(loss, allow_int=True))(state.moving)
    kept = slopes["momentum"]["encoder"], slopes["momentum"]["projector"]
    assert all((np.asarray(x) == 0).all() for x in jax.tree.leaves(kept))


def test_keys_are_constants_of_the_gradient(cmae, one_device, monkeypatch):
    """Although the branch is a copy of the encoder, made in the same step."""
    built, batch, kept = TrainStep.build(cmae, one_device), make_batch(cmae), []
    state = built.init(jax.random.key(0))

    def loss(params):
        return nnx.merge(built.graph, params, state.moving, {}).loss(batch, KEY)[0]

    def noting(params):
        kept.clear()
        loss(params)
        return kept[0]

    def given(params):
        return loss(params)

    keys_of = MomentumBranch.__call__
    noted = lambda *a: kept.append(keys_of(*a)) or kept[-1]  # noqa: E731
    monkeypatch.setattr(MomentumBranch, "__call__", noted)
    keys = jax.jit(noting)(state.params)
    monkeypatch.setattr(MomentumBranch, "__call__", keys_of)
    found = jax.jit(jax.grad(loss))(state.params)
    monkeypatch.setattr(MomentumBranch, "__call__", lambda *a: keys)
    expected = jax.jit(jax.grad(given))(state.params)  # another function, so traced anew
    close(found, expected, rtol=1e-3, atol=1e-6)


def test_eight_devices_give_what_one_gives(cmae, one_device):
    """InfoNCE's negatives are those of the global batch, wherever they are."""
    meshes = one_device, sharding.make_mesh(MeshConfig(data=4, fsdp=2))
    batches = [make_batch(cmae, step) for step in range(4)]
    (one, expected), (eight, found) = (train_on(cmae, mesh, batches) for mesh in meshes)
    close(found, expected, rtol=1e-5)
    # Where a gradient is next to nothing, Adam magnifies its rounding: the norm of all is compared.
    states = [jax.tree.leaves(x.moving) for x in (one, eight)]
    a, b = (np.concatenate([np.ravel(x) for x in state]) for state in states)
    assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a)


def test_every_term_falls_on_one_batch(cmae, one_device):
    cfg = with_tasks(cmae, contrastive=ContrastiveConfig(weight=1.0, temperature=0.2))
    optim = OptimConfig(lr=3e-3, warmup_epochs=1, weight_decay=0.0)
    cfg = changed(cfg, epochs=40, optim=optim)
    batch = make_batch(cfg)
    batch = batch.replace(views=batch.views[:1] * 2)  # noise has nothing in common
    _, (first, *_, last) = train_on(cfg, one_device, [batch] * cfg.total_steps)
    assert last["reconstruction"] < 0.95 * first["reconstruction"]
    assert last["position"] < 0.8 * first["position"]
    assert last["contrastive"] < first["contrastive"] - 0.5
    assert last["contrastive_accuracy"] > 0.9
