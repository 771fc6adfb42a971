"""Training a tokenizer: each term by hand, dead codes, both sides of the game, whole runs."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ONE, make_batch, train_on
from etils import epath
from flax import nnx

from supmim_jax import encoder, probe, sharding, tokenizers, train_step, visualize
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import (
    AdversarialConfig,
    MasksConfig,
    MeshConfig,
    OptimConfig,
    PerceptualConfig,
    ProbeConfig,
    ProbeDataConfig,
    VQGANConfig,
    VQGANObjectiveConfig,
    changed,
)
from supmim_jax.data.loader import Dataset
from supmim_jax.errors import SetupError
from supmim_jax.evals import evaluate
from supmim_jax.objectives.vqgan import VQGANTraining
from supmim_jax.train import train
from supmim_jax.train_step import TrainStep

pytestmark = pytest.mark.usefixtures("build_once")

TINY = VQGANConfig(filters=8, multipliers=(1, 1, 2), res_blocks=1, groups=4, codes=16, code_dim=4)


@pytest.fixture
def vqgan(cfg):
    """A run of 12 steps that trains a tokenizer of 4-pixel tokens."""
    optim = OptimConfig(lr=3e-3, weight_decay=0.0, b2=0.99, warmup_epochs=0.5)
    return changed(cfg, objective=VQGANObjectiveConfig(tokenizer=TINY), optim=optim)


def with_terms(vqgan, **changes):
    return changed(vqgan, objective=changes)


@nnx.jit
def loss_of(model: VQGANTraining, batch):
    return model.loss(batch, jax.random.key(0))


def test_the_terms_by_hand(vqgan):
    cfg = with_terms(vqgan, l1_weight=0.5, entropy_weight=0.2, entropy_temperature=0.3)
    model = VQGANTraining(cfg, rngs=nnx.Rngs(0))
    batch = make_batch(cfg)
    batch = dataclasses.replace(batch, weight=batch.weight.copy())
    batch.weight[-5:] = 0  # padding counts nowhere
    x = np.asarray(batch.views[0][:-5], np.float64) / 127.5 - 1
    z = np.asarray(model.tokenizer.latents(x.astype(np.float32)), np.float64).reshape(11, 25, 4)
    codes = np.asarray(model.tokenizer.codebook[...], np.float64)
    distance = ((z[:, :, None] - codes) ** 2).sum(-1)
    ids = distance.argmin(-1)
    again = np.asarray(model.tokenizer.decode(ids), np.float64)
    p = np.exp(-distance / 0.3) / np.exp(-distance / 0.3).sum(-1, keepdims=True)
    mean_p = p.mean((0, 1))
    entropy = -(p * np.log(p)).sum(-1).mean() + (mean_p * np.log(mean_p)).sum()
    expected = {
        "l1": 0.5 * np.abs(again - x).mean(),
        "l2": ((again - x) ** 2).mean(),
        "codebook": ((codes[ids] - z) ** 2).mean(),
        "commitment": 0.25 * ((codes[ids] - z) ** 2).mean(),
        "entropy": 0.2 * entropy,
    }
    loss, found = loss_of(model, batch)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(loss, sum(expected.values()), rtol=1e-4)
    np.testing.assert_allclose(found["code_usage"], len(np.unique(ids)) / 16)
    np.testing.assert_allclose(
        found["psnr"], 10 * np.log10(4 / ((again - x) ** 2).mean()), rtol=1e-4
    )


def reached(name, model, cfg) -> dict[str, bool]:
    """Whether the gradient of a term reaches the modules and the codebook."""
    graph, params, moving, _ = train_step.parts(model)
    batch, key = make_batch(cfg), jax.random.key(0)
    term = lambda params: nnx.merge(graph, params, moving, {}).loss(batch, key)[1][name]  # noqa: E731
    found = jax.jit(jax.grad(term))(params)
    return {k: optax.tree.norm(x) > 0 for k, x in (found | found["tokenizer"]).items()}


@pytest.mark.parametrize(
    ("weight", "parts"),
    [
        ("l2_weight", {"encoder", "decoder"}),
        ("codebook_weight", {"codebook"}),
        ("commitment_weight", {"encoder"}),
    ],
)
def test_gradients_pass_straight_through_the_codes_and_stop_where_they_should(vqgan, weight, parts):
    off = {"l2_weight": 0.0, "codebook_weight": 0.0, "commitment_weight": 0.0}
    cfg = with_terms(vqgan, entropy_weight=0.0, **(off | {weight: 1.0}))
    found = reached("loss", VQGANTraining(cfg, rngs=nnx.Rngs(0)), cfg)
    assert {k for k in ("encoder", "decoder", "codebook") if found[k]} == parts


def test_dead_codes_are_moved_onto_latents_and_live_ones_stay(vqgan):
    cfg = with_terms(vqgan, usage_decay=0.5, revive_below=0.5)
    model = VQGANTraining(cfg, rngs=nnx.Rngs(0))
    far = model.tokenizer.codebook[...].at[:6].add(100.0)  # never the nearest
    model.tokenizer.codebook[...] = far
    batch = make_batch(cfg)
    latents = np.asarray(model.tokenizer.latents(batch.views[0] / 127.5 - 1.0)).reshape(-1, 4)
    ids = np.asarray(model.tokenizer.encode(batch.views[0] / 127.5 - 1.0))
    share = np.bincount(ids.ravel(), minlength=16) / ids.size
    loss_of(model, batch)
    assert (model.tokenizer.codebook[...][:6] == far[:6]).all()  # 0.5 / 16 is not below the mark
    model.usage[...] = model.usage[...].at[6:].set(1.0)
    loss_of(model, batch)
    codes = np.asarray(model.tokenizer.codebook[...])
    assert (codes[6:] == far[6:]).all() and (codes[:6] != far[:6]).all()
    nearest = np.abs(codes[:6, None] - latents).sum(-1).min(1)
    assert nearest.max() < 1e-5 and len(np.unique(codes[:6], axis=0)) > 3
    np.testing.assert_allclose(model.usage[...][:6], 1 / 16)
    np.testing.assert_allclose(model.usage[...][6:], 0.5 + 0.5 * share[6:], rtol=1e-5)


def test_revived_codes_are_in_the_state_after_the_step(vqgan, one_device):
    cfg = with_terms(vqgan, usage_decay=0.0, revive_below=1.0)
    built = TrainStep.build(cfg, one_device)
    state = built.init(jax.random.key(0))
    before = np.asarray(state.params["tokenizer"]["codebook"])
    after, _ = built.step(state, make_batch(cfg), {})
    moved = np.abs(np.asarray(after.params["tokenizer"]["codebook"]) - before).max(1)
    assert (moved > 0.01).sum() >= 4  # the optimizer alone moves an entry by 3e-3
    assert after.moving["usage"].shape == (16,)


def test_the_game_has_two_sides_that_do_not_meet(vqgan):
    game = AdversarialConfig(weight=0.7, r1_weight=4.0, start=0.0, filters=4, layers=2)
    cfg = with_terms(vqgan, adversarial=game, entropy_weight=0.0)
    model = VQGANTraining(cfg, rngs=nnx.Rngs(0))
    batch = make_batch(cfg)
    x = jnp.asarray(batch.views[0]) / 127.5 - 1.0
    fake = model.tokenizer.decode(model.tokenizer.encode(x))
    judge = model.discriminator
    softplus = jax.nn.softplus
    slope = jax.vmap(jax.grad(lambda image: judge(image[None]).mean()))(x)
    _, found = loss_of(model, batch)
    np.testing.assert_allclose(found["generator"], 0.7 * softplus(-judge(fake)).mean(), rtol=1e-4)
    both = softplus(-judge(x)).mean() + softplus(judge(fake)).mean()
    np.testing.assert_allclose(found["discriminator"], both, rtol=1e-4)
    np.testing.assert_allclose(found["r1"], 2.0 * (slope**2).sum((1, 2, 3)).mean(), rtol=1e-4)

    for name in ("generator", "discriminator", "r1"):
        sides = reached(name, model, cfg)
        assert sides["discriminator"] == (name != "generator") != sides["tokenizer"]


def test_the_discriminator_acts_from_its_start_on(vqgan, one_device):
    game = AdversarialConfig(weight=1.0, start=0.25, filters=4, layers=2)
    cfg = with_terms(vqgan, adversarial=game)
    state, metrics = train_on(cfg, one_device, [make_batch(cfg)] * 5)
    terms = [x["generator"] for x in metrics]
    assert terms[:3] == [0, 0, 0] and min(terms[3:]) > 0 and int(state.moving["steps"]) == 5


def test_perceptual_distance_is_that_of_the_named_encoder(cfg, vqgan, one_device, tmp_path):
    train(cfg, tmp_path / "encoder", stop_at=2, devices=ONE)
    perceptual = PerceptualConfig(weight=3.0, checkpoint=str(tmp_path / "encoder"))
    run = with_terms(vqgan, perceptual=perceptual)
    built = TrainStep.build(run, one_device)
    arrays = tokenizers.Frozen.open(run, Dataset(run), epath.Path(tmp_path), built).arrays
    state = built.init(jax.random.key(0))
    model = nnx.merge(built.graph, state.params, state.moving, arrays)
    runner = encoder.build_encoder(cfg, 16, one_device)
    params = Checkpoint.open(str(tmp_path / "encoder")).restore_params(runner.params)
    batch = make_batch(run)
    images = jnp.asarray(batch.views[0]) / 127.5 - 1.0

    def tokens(x):  # through uint8, as evaluators see images
        grid = runner.features(params, x).tokens.reshape(16, 25, -1)
        return grid / jnp.linalg.norm(grid, axis=-1, keepdims=True)

    fake = model.tokenizer.decode(model.tokenizer.encode(images))
    shown = ((fake.clip(-1, 1) + 1) * 127.5).astype(jnp.uint8)
    expected = 3.0 * ((tokens(shown) - tokens(batch.views[0])) ** 2).mean()
    found = loss_of(model, batch)[1]["perceptual"]
    np.testing.assert_allclose(found, expected, rtol=0.1)  # 8 bits, and values beyond white
    results = train(run, tmp_path / "tokenizer", devices=ONE)
    assert results["psnr"] > 5 and not (tmp_path / "tokenizer" / tokenizers.FILE).exists()
    wider = changed(run, model={"mlp_dim": 96})
    with pytest.raises(SetupError, match=r"fc1/kernel is float32\[2, 32, 64\] in the checkpoint"):
        train(wider, tmp_path / "other", devices=ONE)


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(MeshConfig(data=8), marks=pytest.mark.slow), MeshConfig(data=2, fsdp=2)],
    ids=str,
)
def test_several_devices_give_the_losses_of_one(vqgan, one_device, mesh):
    game = AdversarialConfig(weight=0.1, start=0.0, filters=8, layers=2)
    cfg = with_terms(vqgan, adversarial=game, revive_below=0.5, usage_decay=0.5)

    batches = list(itertools.islice(Dataset.open(cfg).train(one_device), 3))
    several = sharding.make_mesh(mesh, jax.devices()[: mesh.data * mesh.fsdp])
    (_, expected), (_, found) = (train_on(cfg, x, batches) for x in (one_device, several))
    for one, other in zip(expected, found, strict=True):
        terms = "loss", "perplexity", "r1"
        np.testing.assert_allclose([other[k] for k in terms], [one[k] for k in terms], rtol=2e-4)


def test_a_tokenizer_learns_one_batch(vqgan, one_device):
    cfg = changed(vqgan, batch_size=4, epochs=20)
    batch = next(Dataset.open(cfg).train(one_device))
    _, (first, *_, last) = train_on(cfg, one_device, [batch] * cfg.total_steps)
    assert last["psnr"] > first["psnr"] + 4 and last["perplexity"] > 4


def test_a_run_resumes_and_its_tokens_are_a_target(cfg, vqgan, one_device, tmp_path):
    whole = train(vqgan, tmp_path / "whole", devices=ONE)
    train(vqgan, tmp_path / "parts", stop_at=5, devices=ONE)
    assert train(vqgan, tmp_path / "parts", devices=ONE) | {"seconds": whole["seconds"]} == whole
    probed = probe.probe(Checkpoint.open(str(tmp_path / "whole")), devices=ONE).results.metrics
    assert probed == {name: whole[name] for name in ("psnr", "codes_used", "perplexity")}
    masks = ProbeConfig(data=ProbeDataConfig(masks=MasksConfig(field="segmentation")))
    report = probe.probe(Checkpoint.open(str(tmp_path / "whole")), masks)
    assert report.results.metrics["psnr"] > 0 and report.left_out() == []
    target = dataclasses.replace(TINY, path=str(tmp_path / "whole"))
    run = changed(cfg, objective={"target": target})
    results = train(run, tmp_path / "supmim", stop_at=2, devices=ONE)
    assert results == {} and not (tmp_path / "supmim" / tokenizers.FILE).exists()
    step_fn = TrainStep.build(run, one_device)
    like = step_fn.frozen["target"]
    stored = Checkpoint.open(target.path).restore_params(like)["tokenizer"]
    frozen = tokenizers.Frozen.open(run, Dataset(run), epath.Path(tmp_path), step_fn)
    assert frozen.identity == tokenizers.digest(stored)
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 20, 1), np.uint8)
    for workdir, rows in (("whole", 2), ("supmim", 4)):
        restored = visualize.restore(Checkpoint.open(str(tmp_path / workdir)))
        panels = visualize.panels(restored, images, jax.random.key(0))
        assert len(panels) == rows and all(x.shape == (2, 20, 20, 1) for x in panels.values())
    for changes, message in (
        ({"codes": 17}, r"objective\.target\.codes: 16; 17"),
        ({"groups": 2}, r"objective\.target\.groups: 4; 2"),  # no shape tells
        ({"path": ""}, "target.path is empty"),
        ({"path": str(tmp_path / "nowhere")}, "cannot be read"),
        ({"path": str(tmp_path / "supmim")}, "is a 'supmim' run, and no tokenizer"),
    ):
        other = changed(run, objective={"target": changes})
        arguments = Dataset(other), epath.Path(tmp_path), like["tokenizer"]
        with pytest.raises(SetupError, match=message):
            tokenizers.open_tokenizer(other, *arguments)


def test_evaluation_counts_by_hand(vqgan, one_device):
    class Halves:
        """Two codes: a dark and a bright image."""

        num_codes = 4

        def encode(self, images):
            return (images.mean((1, 2, 3)) > 60).astype(np.int32)[:, None]

        def decode(self, ids):
            return jnp.broadcast_to((ids * 0.5 - 0.5)[:, :, None, None], (len(ids), 20, 20, 1))

    cfg = changed(vqgan, eval={"batch_size": 48})
    found = evaluate.reconstruction(Halves(), Dataset(cfg), "validation[:70]", one_device)
    images = [b.views[0] for b in Dataset(cfg).eval("validation[:70]", one_device)]
    images = np.concatenate(images)[:70].astype(np.float64)
    bright = images.mean((1, 2, 3)) > 60
    error = (images - np.where(bright, 128, 64)[:, None, None, None]) ** 2
    share = np.array([bright.mean(), 1 - bright.mean()])
    assert 0.05 < bright.mean() < 0.95
    psnr = 20 * np.log10(255 / np.sqrt(error.mean((1, 2, 3))))
    assert found["psnr"] == pytest.approx(psnr.mean(), abs=0.02)
    assert found["codes_used"] == 50.0
    assert found["perplexity"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
