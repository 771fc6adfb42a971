"""Linear classifiers of frozen features: logistic regression, and few-shot least squares.

The linear probe is multinomial logistic regression with L2, by Newton's method. The features are
standardised by the training set's mean and deviation, so that the penalty treats all dimensions
alike. The optimisation is full-batch, with rows split over the mesh. Scaled by 1 / (c n), it
minimises what scikit-learn's LogisticRegression(C=c) does:

  c * sum of cross-entropies + 0.5 * |kernel|^2       (the bias is free)

The minimum is a single point, whatever the mesh. We look for it in float64, because with a weak
penalty float32 rounds away the gradient near the minimum. We work on the axes of the features'
covariance, each scaled by about the root of the curvature along it: on correlated features,
conjugate gradients, which solve for Newton's step, would need thousands of products. (L-BFGS on the
same axes does not converge in 3,000 steps if the penalty is weak and the classes are nearly
separable.)

The few-shot classifier is that of big_vision's evaluator, as ViT (arXiv 2010.11929, section 4.1)
reports it: regularised least squares in closed form, of features standardised by the shots, with a
constant column for the bias and targets +1 on the label and -1 elsewhere. Everything is float64 on
the host, so devices make no difference.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh, PartitionSpec

from supmim_jax import sharding
from supmim_jax.config import FewShotConfig, LinearProbeConfig
from supmim_jax.evals import features
from supmim_jax.evals.features import CannotEvaluate, Extracted

ROWS = 4096  # of one chunk's logits: memory doesn't grow with the number of examples
TOLERANCE = 1e-9  # converged when the gradient's largest entry is this share of that at zero
STEPS = 100  # of Newton's method, most
PRODUCTS = 1000  # of the Hessian with a vector in each, most


class Probe(NamedTuple):
    """A fitted classifier, and how its fit ended."""

    kernel_DxV: np.ndarray  # float64, for standardised features
    bias_V: np.ndarray  # float64
    mean_D: np.ndarray  # float64
    scale_D: np.ndarray  # float64
    # Its largest entry at the end of the fit, as a share of that at zero; a closed form has none.
    gradient: float = 0.0


class Result(NamedTuple):
    accuracy: float  # on the test set, per cent
    c: float  # the best strength
    held_out: dict[float, float]  # accuracy on the held-out part of train for each c, per cent
    probe: Probe


def evaluate(
    train: Extracted, test: Extracted, classes: int, cfg: LinearProbeConfig, mesh: Mesh
) -> Result:
    """Chooses c on a held-out share of train, refits on all of train, and tests once.

    Of equal accuracies the smallest c, the strongest penalty, wins.

    Raises:
      CannotEvaluate: features are not finite, or no example can be held out.
    """
    features.check_finite(train.pooled, "features of the linear probe")
    features.check_finite(test.pooled, "test features of the linear probe")
    aside_N = hold_out(train.label, cfg.held_out, cfg.seed)
    kept = (train.pooled[~aside_N], train.label[~aside_N])
    scores = {}
    for c in sorted(set(cfg.strengths)):
        probe = fit(*kept, classes=classes, c=c, mesh=mesh)
        scores[c] = accuracy(probe, train.pooled[aside_N], train.label[aside_N])
    best = max(scores, key=scores.get)  # the first of equals
    probe = fit(train.pooled, train.label, classes=classes, c=best, mesh=mesh)
    return Result(accuracy(probe, test.pooled, test.label), best, scores, probe)


def hold_out(labels_N: np.ndarray, share: float, seed: int) -> np.ndarray:
    """Which examples are held out, bool N: this share of every class, chosen by seed and index.

    A class with two examples or more loses at least one and keeps at least one.
    """
    order = np.random.default_rng(seed).permutation(len(labels_N))
    order = order[np.argsort(labels_N[order], kind="stable")]
    counts_V = np.bincount(labels_N)
    rank_N = np.arange(len(order)) - np.repeat(np.cumsum(counts_V) - counts_V, counts_V)
    wanted_V = np.clip(np.round(share * counts_V), 1, np.maximum(counts_V - 1, 0))
    aside_N = np.zeros(len(labels_N), bool)
    aside_N[order] = rank_N < np.repeat(wanted_V, counts_V)
    if not aside_N.any():
        raise CannotEvaluate(
            f"None of {len(labels_N)} training examples can be held out: each is the only one of "
            f"its class."
        )
    return aside_N


def fit(
    features_NxD: np.ndarray, labels_N: np.ndarray, *, classes: int, c: float, mesh: Mesh
) -> Probe:
    """The minimum of the objective above, from zero: one point whatever the mesh.

    Where STEPS end before TOLERANCE is reached, that is logged, and the result's `gradient` tells
    how far it came.
    """
    mean = features_NxD.mean(axis=0, dtype=np.float64)
    scale = features_NxD.std(axis=0, dtype=np.float64)
    scale = np.where(scale <= 1e-6 * np.abs(mean), 1.0, scale)  # constant dimensions
    count = len(features_NxD)
    chunk = min(ROWS, -(-count // mesh.size))
    total = features.round_up(count, chunk * mesh.size)
    covariance_DxD = sum(x.T @ x for x in _standardised(features_NxD, mean, scale)) / count
    variance_D, axes_DxD = np.linalg.eigh(covariance_DxD)
    # The curvature of the cross-entropy at zero, where all classes are equally likely.
    curvature_D = np.maximum(variance_D, 0) * (1 - 1 / classes) / classes + 1 / (c * count)
    axes_DxD = axes_DxD / np.sqrt(curvature_D)

    def place(x: np.ndarray) -> jax.Array:
        return features.spread(features.padded(x, total).reshape(-1, chunk, *x.shape[1:]), mesh)

    with jax.enable_x64(True):
        penalty_D = 1 / (c * count * curvature_D)
        given = (
            place(np.concatenate([x @ axes_DxD for x in _standardised(features_NxD, mean, scale)])),
            place(labels_N.astype(np.int32)),
            place(np.full(count, 1.0 / count)),  # the weight of padding is 0
            sharding.put(penalty_D, sharding.replicated(penalty_D, mesh)),
        )
        found = _minimise(*given, classes=classes, steps=STEPS, mesh=mesh)
        (kernel, bias), taken, slope = jax.device_get(found)
    if slope > TOLERANCE:
        logging.error(
            "Linear probe, c = %g: after %d steps the gradient is %.1e of that at zero, not %.1e.",
            *(c, taken, slope, TOLERANCE),
        )
    return Probe(axes_DxD @ kernel, bias, mean, scale, float(slope))


def predict(probe: Probe, features_NxD: np.ndarray) -> np.ndarray:
    """Class of each example, int32 N."""
    chunks = _standardised(features_NxD, probe.mean_D, probe.scale_D)
    logits = (x @ probe.kernel_DxV + probe.bias_V for x in chunks)
    return np.concatenate([x.argmax(axis=1).astype(np.int32) for x in logits])


def accuracy(probe: Probe, features_NxD: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of the examples that `probe` gets right, per cent."""
    return 100.0 * float((predict(probe, features_NxD) == labels_N).mean())


def _standardised(x_NxD: np.ndarray, mean: np.ndarray, scale: np.ndarray) -> Iterator[np.ndarray]:
    """float64 rows in chunks: they are twice the size of what is given."""
    for start in range(0, len(x_NxD), ROWS):
        yield (x_NxD[start : start + ROWS].astype(np.float64) - mean) / scale


@functools.partial(jax.jit, static_argnames=("classes", "steps", "mesh"))
def _minimise(x_CxNxD, labels_CxN, weight_CxN, penalty_D, *, classes, steps, mesh):
    """((kernel, bias), steps taken, gradient as a share of that at zero) of Newton's method.

    The objective is the weighted sum of cross-entropies and half of penalty * kernel^2.
    """

    @jax.checkpoint  # logits are made again for the gradient instead of kept for all rows
    def chunk_loss(params, x_NxD, labels_N, weight_N):
        logits_NxV = jnp.matmul(x_NxD, params[0], precision=jax.lax.Precision.HIGHEST) + params[1]
        loss_N = optax.softmax_cross_entropy_with_integer_labels(logits_NxV, labels_N)
        return (loss_N * weight_N).sum()

    def on_device(params, *chunks):
        losses_C = jax.lax.map(lambda chunk: chunk_loss(params, *chunk), chunks)
        return jax.lax.psum(losses_C.sum(), mesh.axis_names)

    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    specs = (whole, split, split, split)
    total = jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=whole)

    def objective(params):
        loss = total(params, x_CxNxD, labels_CxN, weight_CxN)
        return loss + 0.5 * (penalty_D[:, None] * params[0] ** 2).sum()

    gradient = jax.grad(objective)

    def largest(grad):
        return optax.tree.norm(grad, ord=jnp.inf)

    def step(carry):
        params, grad, taken = carry

        def curved(direction):
            return jax.jvp(gradient, (params,), (direction,))[1]

        # As exact as the gradient is small: few products at first, and fast convergence at the end.
        share = jnp.minimum(0.1, jnp.sqrt(largest(grad) / first))
        downhill = optax.tree.scale(-1.0, grad)
        direction, _ = jax.scipy.sparse.linalg.cg(curved, downhill, tol=share, maxiter=PRODUCTS)
        value, slope = objective(params), optax.tree.vdot(grad, direction)

        def moved(length):
            return optax.tree.add_scale(params, length, direction)

        def too_long(length):
            return (objective(moved(length)) > value + 1e-4 * length * slope) & (length > 1e-9)

        length = jax.lax.while_loop(too_long, lambda x: x / 2, jnp.ones(()))
        return moved(length), gradient(moved(length)), taken + 1

    def unfinished(carry):
        _, grad, taken = carry
        return (taken < steps) & (largest(grad) > TOLERANCE * first)

    zero = (jnp.zeros((x_CxNxD.shape[-1], classes)), jnp.zeros(classes))
    first = largest(gradient(zero))
    carry = zero, gradient(zero), jnp.zeros((), jnp.int32)
    params, grad, taken = jax.lax.while_loop(unfinished, step, carry)
    return params, taken, largest(grad) / first


# --- few-shot


def few_shot(
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
        probe = least_squares(train.pooled[chosen], train.label[chosen], classes, cfg.penalty)
        accuracies.append(accuracy(probe, test.pooled, test.label))
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


def least_squares(
    features_NxD: np.ndarray, labels_N: np.ndarray, classes: int, penalty: float
) -> Probe:
    """The kernel and bias, as one W, that minimise |X W - Y|^2 + penalty |W|^2.

    The last row of W is the bias, of a column of ones in X (100 in big_vision, so that the penalty
    hardly touches it: with as many shots of each class it is the same for all, and no matter).
    The smaller of the two systems of normal equations is solved: D + 1 unknowns, or N, its dual.
    """
    x = features_NxD.astype(np.float64)
    mean, scale = x.mean(axis=0), x.std(axis=0) + 1e-5
    x = np.column_stack([(x - mean) / scale, np.ones(len(x))])
    y = np.where(labels_N[:, None] == np.arange(classes), 1.0, -1.0)
    if len(x) < x.shape[1]:
        weights = x.T @ np.linalg.solve(x @ x.T + penalty * np.eye(len(x)), y)
    else:
        weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return Probe(weights[:-1], weights[-1], mean, scale)
