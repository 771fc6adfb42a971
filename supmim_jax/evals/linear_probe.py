"""Linear probe: multinomial logistic regression with L2 on frozen features, by L-BFGS.

The features are standardised by the training set's mean and deviation (so the penalty sees every
dimension alike) in float32, the optimisation is full-batch, and its rows are split over the mesh.
What is minimised, scaled by 1 / (c n), is scikit-learn's LogisticRegression(C=c):

  c * sum of cross-entropies + 0.5 * |kernel|^2       (the bias is free)
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec

from supmim_jax.evals import rows
from supmim_jax.evals.results import CannotEvaluate

ROWS = 4096  # of one chunk's logits: memory doesn't grow with the training set
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)  # c; a small one is a strong penalty
TOLERANCE = 1e-7  # converged when the gradient's largest entry is this share of that at zero
PATIENCE = 20  # or when it has not shrunk for as many steps: float32 has no more to give
STEPS = 1000  # most L-BFGS steps


class Probe(NamedTuple):
    """A fitted classifier, and how its fit ended."""

    kernel_DxV: np.ndarray  # float32, for standardised features
    bias_V: np.ndarray  # float32
    mean_D: np.ndarray  # float32
    scale_D: np.ndarray  # float32
    steps: int
    gradient: float  # its largest entry at the end, as a share of that at zero


class Result(NamedTuple):
    accuracy: float  # on the test set, per cent
    c: float  # the best strength
    held_out: dict[float, float]  # accuracy on the held-out part of train for each c, per cent
    probe: Probe


def evaluate(
    train_NxD: np.ndarray,
    train_labels_N: np.ndarray,
    test_MxD: np.ndarray,
    test_labels_M: np.ndarray,
    *,
    classes: int,
    strengths: Sequence[float] = STRENGTHS,
    held_out: float = 0.2,
    seed: int = 0,
    mesh: Mesh | None = None,
) -> Result:
    """Chooses c on a held-out share of train, refits on all of train, and tests once.

    Of equal accuracies the smallest c, the strongest penalty, wins.

    Raises:
      SetupError: the arrays don't fit together.
    """
    rows.check_features(test_MxD, "test features of the linear probe")
    rows.check_labels(test_labels_M, test_MxD, classes, "test labels of the linear probe")
    aside_N = hold_out(train_labels_N, held_out, seed)
    kept = (train_NxD[~aside_N], train_labels_N[~aside_N])
    scores = {}
    for c in sorted(set(strengths)):
        probe = fit(*kept, classes=classes, c=c, mesh=mesh)
        scores[c] = accuracy(probe, train_NxD[aside_N], train_labels_N[aside_N])
    best = max(scores, key=scores.get)  # the first of equals
    probe = fit(train_NxD, train_labels_N, classes=classes, c=best, mesh=mesh)
    return Result(accuracy(probe, test_MxD, test_labels_M), best, scores, probe)


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
    features_NxD: np.ndarray,
    labels_N: np.ndarray,
    *,
    classes: int,
    c: float,
    mesh: Mesh | None = None,
    chunk: int = ROWS,
    tolerance: float = TOLERANCE,
    steps: int = STEPS,
) -> Probe:
    """The minimum of the objective above, from zero.

    It is one point whatever the mesh and the chunk, up to the order of float32 sums.

    Raises:
      SetupError: the arrays don't fit together.
    """
    rows.check_features(features_NxD, "features of the linear probe")
    rows.check_labels(labels_N, features_NxD, classes, "labels of the linear probe")
    mesh = mesh or rows.everywhere()
    mean, scale = _moments(features_NxD)
    count = len(features_NxD)
    chunk = min(chunk, -(-count // mesh.size))
    total = rows.round_up(count, chunk * mesh.size)

    def place(x: np.ndarray) -> jax.Array:
        return rows.spread(rows.padded(x, total).reshape(-1, chunk, *x.shape[1:]), mesh)

    examples = (
        place((features_NxD.astype(np.float32) - mean) / scale),
        place(labels_N.astype(np.int32)),
        place(np.full(count, 1.0 / count, np.float32)),  # the weight of padding is 0
    )
    penalty, tolerance = (
        rows.copied(np.asarray(x, np.float32), mesh) for x in (1.0 / (c * count), tolerance)
    )
    (kernel, bias), taken, slope = _minimise(
        *examples, penalty, tolerance, classes=classes, steps=steps, mesh=mesh
    )
    return Probe(np.asarray(kernel), np.asarray(bias), mean, scale, int(taken), float(slope))


def predict(probe: Probe, features_NxD: np.ndarray) -> np.ndarray:
    """Class of each example, int32 N."""
    found = []
    for start in range(0, len(features_NxD), ROWS):
        x = features_NxD[start : start + ROWS].astype(np.float32)
        logits = ((x - probe.mean_D) / probe.scale_D) @ probe.kernel_DxV + probe.bias_V
        found.append(logits.argmax(axis=1).astype(np.int32))
    return np.concatenate(found)


def accuracy(probe: Probe, features_NxD: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of the examples that `probe` gets right, per cent."""
    return 100.0 * float((predict(probe, features_NxD) == labels_N).mean())


def _moments(x_NxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation, float32 D each; the deviation of a constant dimension counts as 1."""
    mean, scale = x_NxD.mean(axis=0, dtype=np.float64), x_NxD.std(axis=0, dtype=np.float64)
    constant = scale <= 1e-6 * np.abs(mean)
    return mean.astype(np.float32), np.where(constant, 1.0, scale).astype(np.float32)


def _objective(x_CxNxD, labels_CxN, weight_CxN, penalty, mesh: Mesh):
    """Weighted sum of cross-entropies and penalty / 2 * |kernel|^2, of (kernel, bias)."""

    @jax.checkpoint  # logits are made again for the gradient instead of kept for all rows
    def chunk_loss(params, x_NxD, labels_N, weight_N):
        logits_NxV = jnp.matmul(x_NxD, params[0], precision=jax.lax.Precision.HIGHEST) + params[1]
        loss_N = optax.softmax_cross_entropy_with_integer_labels(logits_NxV, labels_N)
        return (loss_N * weight_N).sum()

    def on_device(params, *chunks):
        losses_C = jax.lax.map(lambda chunk: chunk_loss(params, *chunk), chunks)
        return jax.lax.psum(losses_C.sum(), mesh.axis_names)

    whole, split = PartitionSpec(), PartitionSpec(mesh.axis_names)
    total = jax.shard_map(
        on_device, mesh=mesh, in_specs=(whole, split, split, split), out_specs=whole
    )

    def objective(params):
        loss = total(params, x_CxNxD, labels_CxN, weight_CxN)
        return loss + 0.5 * penalty * (params[0] ** 2).sum()

    return objective


@functools.partial(jax.jit, static_argnames=("classes", "steps", "mesh"))
def _minimise(x_CxNxD, labels_CxN, weight_CxN, penalty, tolerance, *, classes, steps, mesh):
    """((kernel, bias), steps taken, gradient as a share of that at zero) of L-BFGS from zero."""
    objective = _objective(x_CxNxD, labels_CxN, weight_CxN, penalty, mesh)
    value_and_grad = optax.value_and_grad_from_state(objective)
    solver = optax.lbfgs()
    zero = (jnp.zeros((x_CxNxD.shape[-1], classes)), jnp.zeros(classes))

    def largest(grad):
        return optax.tree.norm(grad, ord=jnp.inf)

    def step(carry):
        params, state, _, least, stuck = carry
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(
            grad, state, params, value=value, grad=grad, value_fn=objective
        )
        slope = largest(optax.tree.get(state, "grad"))  # at the new parameters
        stuck = jnp.where(slope < least, 0, stuck + 1)
        return optax.apply_updates(params, updates), state, slope, jnp.minimum(slope, least), stuck

    def unfinished(carry):
        _, state, slope, _, stuck = carry
        taken = optax.tree.get(state, "count")
        return (taken < steps) & (slope > tolerance * first) & (stuck < PATIENCE)

    first = largest(jax.grad(objective)(zero))
    start = (zero, solver.init(zero), first, first, jnp.zeros((), jnp.int32))
    params, state, slope, _, _ = jax.lax.while_loop(unfinished, step, start)
    return params, optax.tree.get(state, "count"), slope / first
