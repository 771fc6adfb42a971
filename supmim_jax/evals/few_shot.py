"""Few-shot classification of frozen features by regularised least squares, in closed form.

The classifier of big_vision's few-shot evaluator, as ViT (arXiv 2010.11929, section 4.1) reports
it: features standardised by the shots, a constant column for the bias, targets +1 on the label and
-1 elsewhere. Everything is float64 on the host, so devices make no difference.
"""

import numpy as np

from supmim_jax.config import FewShotConfig
from supmim_jax.evals import features
from supmim_jax.evals.features import CannotEvaluate, Extracted

CHUNK = 65536  # examples classified at once


def evaluate(
    train: Extracted, test: Extracted, classes: int, cfg: FewShotConfig
) -> tuple[float, float]:
    """Mean and deviation, over draws of the shots, of the accuracy on the test set in per cent.

    Raises:
      CannotEvaluate: features are not finite, or a class has too few examples.
    """
    features.check_finite(train.pooled, "features of few-shot training")
    features.check_finite(test.pooled, "features of few-shot test")
    accuracies = []
    for draw in range(cfg.draws):
        chosen = draw_shots(train.label, classes, cfg.shots, seed=cfg.seed, draw=draw)
        weights = fit(train.pooled[chosen], train.label[chosen], classes, cfg.penalty)
        accuracies.append(100.0 * (predict(test.pooled, *weights) == test.label).mean())
    return float(np.mean(accuracies)), float(np.std(accuracies))


def draw_shots(labels_N: np.ndarray, classes: int, shots: int, *, seed: int, draw: int):
    """`shots` examples of every class, rows in ascending order; a function of (seed, draw)."""
    counts_V = np.bincount(labels_N, minlength=classes)
    if counts_V.min() < shots:
        scarce = int(counts_V.argmin())
        raise CannotEvaluate(
            f"{shots} shots are wanted of each class, but class {scarce} has {counts_V[scarce]} "
            f"training examples. Take at most {counts_V[scarce]} shots."
        )
    order = np.random.default_rng([seed, draw]).permutation(len(labels_N))
    by_class = order[np.argsort(labels_N[order], kind="stable")]
    starts_V = np.cumsum(counts_V) - counts_V
    return np.sort(by_class[(starts_V[:, None] + np.arange(shots)).ravel()])


def fit(features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, penalty: float):
    """(mean D, scale D, weights (D+1)xV) that minimise |X W - Y|^2 + penalty |W|^2.

    The last row of W is the bias, of a column of ones (100 in big_vision, so that the penalty
    hardly touches it: with as many shots of each class it is the same for all, and no matter).
    The smaller of the two systems of normal equations is solved: D + 1 unknowns, or N, its dual.
    """
    x = features_NxD.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-5
    x = _with_ones((x - mean) / scale)
    y = np.where(labels_N[:, None] == np.arange(classes), 1.0, -1.0)
    if len(x) < x.shape[1]:
        return mean, scale, x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    return mean, scale, np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)


def predict(features_NxD: np.ndarray, mean_D, scale_D, weights_DxV) -> np.ndarray:
    """Class of each example, int N."""
    chunks = (features_NxD[i : i + CHUNK] for i in range(0, len(features_NxD), CHUNK))
    logits = (_with_ones((x - mean_D) / scale_D) @ weights_DxV for x in chunks)
    return np.concatenate([x.argmax(axis=1) for x in logits])


def _with_ones(x_NxD: np.ndarray) -> np.ndarray:
    return np.concatenate([x_NxD, np.ones((len(x_NxD), 1))], axis=1)
