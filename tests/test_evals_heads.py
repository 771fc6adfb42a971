"""Linear probe against scikit-learn, few-shot least squares against lstsq, on any mesh."""

import jax
import numpy as np
import pytest
from conftest import make_clusters
from scipy import special
from sklearn.linear_model import LogisticRegression

from supmim_jax import sharding
from supmim_jax.config import FewShotConfig, LinearProbeConfig, MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import linear_probe
from supmim_jax.evals.features import Extracted


def hard_problem(count: int, seed: int = 0):
    """10 overlapping classes in 32 dimensions of unlike scale and offset."""
    x, labels = make_clusters(count, classes=10, dim=32, spread=2.0, seed=seed)
    scale, offset = np.random.default_rng(2).uniform((0.1, -3), (5, 3), (32, 2)).T
    return x * scale + offset, labels


def unlike_scales(condition: float, long_tailed: bool, seed: int = 0):
    """600 examples of 6 classes in 24 correlated dimensions of this condition number."""
    rng = np.random.default_rng(seed)
    share = 1 / np.arange(1, 7) if long_tailed else np.ones(6)
    labels = rng.choice(6, 600, p=share / share.sum()).astype(np.int32)
    labels[:6] = np.arange(6)
    x = rng.normal(size=(600, 24)) + 1.5 * rng.normal(size=(6, 24))[labels]
    turn = np.linalg.qr(np.random.default_rng(9).normal(size=(24, 24)))[0]
    return ((x * np.logspace(0, -np.log10(condition), 24)) @ turn).astype(np.float32), labels


def labelled(x, labels) -> Extracted:
    return Extracted(x, labels, np.arange(len(x)), None)


def objective(kernel, bias, x, labels, c: float) -> float:
    """Of scikit-learn's LogisticRegression(C=c), divided by c n, in float64."""
    logits = x @ kernel + bias
    losses = special.logsumexp(logits, axis=1) - logits[np.arange(len(x)), labels]
    return losses.mean() + 0.5 / (c * len(x)) * (kernel**2).sum()


@pytest.mark.parametrize(("condition", "long_tailed"), [(1.0, False), (1e3, True), (1e6, False)])
@pytest.mark.parametrize("c", [1e-4, 0.1, 100.0, 1e4])
def test_the_probe_is_scikit_learns_logistic_regression_on_any_mesh(
    monkeypatch, c, condition, long_tailed
):
    monkeypatch.setattr(linear_probe, "ROWS", 100)
    x, labels = unlike_scales(condition, long_tailed)
    z = (x - x.mean(0, np.float64)) / x.std(0, dtype=np.float64)
    options = {"tol": 1e-12, "max_iter": 10**5, "solver": "newton-cg"}
    theirs = LogisticRegression(C=c, **options).fit(z, labels)
    least = objective(theirs.coef_.T, theirs.intercept_, z, labels, c)
    test, _ = unlike_scales(condition, long_tailed, seed=1)
    expected = None
    for count in (1, 8):
        mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:count])
        probe = linear_probe.fit(x, labels, classes=6, c=c, mesh=mesh)
        own = (x - probe.mean_D) / probe.scale_D
        assert objective(probe.kernel_DxV, probe.bias_V, own, labels, c) <= least * (1 + 1e-6)
        assert probe.gradient <= linear_probe.TOLERANCE
        found = linear_probe.predict(probe, test)
        expected = found if expected is None else expected
        assert (found == expected).all()
    right = theirs.predict((test - x.mean(0, np.float64)) / x.std(0, dtype=np.float64))
    assert (found == right).mean() > 0.99  # all but near ties


def test_a_fit_that_is_cut_off_says_how_far_it_came(one_device, monkeypatch, caplog):
    monkeypatch.setattr(linear_probe, "STEPS", 2)
    x, labels = unlike_scales(1e3, False)
    probe = linear_probe.fit(x, labels, classes=6, c=1e4, mesh=one_device)
    assert probe.gradient > linear_probe.TOLERANCE
    assert f"after 2 steps the gradient is {probe.gradient:.1e}" in caplog.text


def test_strength_is_chosen_on_held_out_training_examples(one_device):
    x, labels = hard_problem(400)
    test = labelled(*hard_problem(1000, seed=1))

    def evaluated(x, *strengths: float):
        cfg = LinearProbeConfig(strengths=strengths)
        return linear_probe.evaluate(labelled(x, labels), test, 10, cfg, one_device)

    result = evaluated(x, 1e-5, 0.01, 10.0)
    assert result.c == 0.01 and result.held_out[0.01] == max(result.held_out.values())
    again = linear_probe.fit(x, labels, classes=10, c=0.01, mesh=one_device)  # on all of train
    assert (again.kernel_DxV == result.probe.kernel_DxV).all()
    assert result.accuracy == linear_probe.accuracy(again, test.pooled, test.label)
    easy, _ = make_clusters(400, classes=10, dim=32)  # has the same labels
    tied = evaluated(easy, 10.0, 1.0, 0.1)
    assert set(tied.held_out.values()) == {100.0} and tied.c == 0.1


def test_the_held_out_part_is_the_same_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [40, 10, 2, 1])
    aside = linear_probe.hold_out(labels, 0.2, seed=0)
    assert np.bincount(labels[aside], minlength=4).tolist() == [8, 2, 1, 0]
    assert (aside == linear_probe.hold_out(labels, 0.2, seed=0)).all()
    assert (aside != linear_probe.hold_out(labels, 0.2, seed=1)).any()
    with pytest.raises(SetupError, match="can be held out"):
        linear_probe.hold_out(np.arange(5), 0.2, seed=0)


def test_a_constant_dimension_is_left_out(one_device):
    x, labels = hard_problem(1000)
    x[:, 30:] = 0.0, 3.1
    probe = linear_probe.fit(x, labels, classes=10, c=0.1, mesh=one_device)
    rest = (x[:, :30] - x[:, :30].mean(axis=0)) / x[:, :30].std(axis=0)
    reference = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(rest, labels)
    np.testing.assert_allclose(probe.kernel_DxV[:30], reference.coef_.T, atol=2e-4)
    np.testing.assert_allclose(probe.kernel_DxV[30:], 0, atol=1e-6)


@pytest.mark.parametrize(("count", "dim"), [(60, 12), (30, 50)])
def test_few_shot_weights_are_those_of_a_direct_least_squares(count, dim):
    x, labels = make_clusters(count, dim=dim, spread=2.0)
    probe = linear_probe.least_squares(x, labels, 5, penalty=3.0)
    z = (x.astype(np.float64) - x.mean(0, np.float64)) / (x.std(0, np.float64) + 1e-5)
    z = np.hstack([z, np.ones((count, 1))])
    augmented = np.vstack([z, np.sqrt(3.0) * np.eye(dim + 1)])  # the penalty as further rows
    targets = np.vstack([2 * np.eye(5)[labels] - 1, np.zeros((dim + 1, 5))])
    expected = np.linalg.lstsq(augmented, targets)[0]
    weights = np.vstack([probe.kernel_DxV, probe.bias_V])
    np.testing.assert_allclose(weights, expected, atol=1e-9)
    assert (linear_probe.predict(probe, x) == (z @ expected).argmax(1)).all()


def test_draws_of_shots():
    labels = np.random.default_rng(0).integers(0, 6, 300)
    first, again, other, seeded = (
        linear_probe.draw_shots(labels, 6, 10, seed=seed, draw=draw)
        for seed, draw in ((0, 0), (0, 0), (0, 1), (1, 0))
    )
    assert (first == again).all()
    assert set(first) != set(other) and set(first) != set(seeded)
    for rows in (first, other):
        assert len(set(rows)) == 60 and (np.bincount(labels[rows]) == 10).all()
    with pytest.raises(SetupError, match=r"3 shots .* class 1 has 2 training examples"):
        linear_probe.draw_shots(np.array([0, 0, 0, 1, 1]), 2, 3, seed=0, draw=0)


@pytest.mark.parametrize("shots", [2, 10])
def test_few_shot_accuracy_is_the_mean_over_draws(shots):
    (x, labels), (test, truth) = hard_problem(400), hard_problem(500, seed=1)
    cfg = FewShotConfig(shots=shots, draws=3, penalty=10.0)
    mean, std = linear_probe.few_shot(labelled(x, labels), labelled(test, truth), 10, cfg)
    accuracies = []
    for draw in range(3):
        rows = linear_probe.draw_shots(labels, 10, shots, seed=0, draw=draw)
        fitted = linear_probe.least_squares(x[rows], labels[rows], 10, 10.0)
        accuracies.append(100 * (linear_probe.predict(fitted, test) == truth).mean())
    assert mean == np.mean(accuracies) and std == np.std(accuracies) > 0


@pytest.mark.parametrize("place", [0, 1])
def test_features_that_are_not_finite_are_refused(one_device, place):
    x, labels = make_clusters(50)
    data = [labelled(x, labels)] * 2
    data[place] = labelled(x * np.inf, labels)
    with pytest.raises(SetupError, match="50 of 50 rows"):
        linear_probe.evaluate(*data, 5, LinearProbeConfig(), one_device)
    with pytest.raises(SetupError, match="50 of 50 rows"):
        linear_probe.few_shot(*data, 5, FewShotConfig(shots=2))
