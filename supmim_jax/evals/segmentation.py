"""Semantic segmentation on frozen encoder tokens: a linear or a light convolutional head.

A head sees the grid of tokens BxHxWxD. Its logits are upsampled bilinearly to the size of the masks
and trained there with pixel-wise cross-entropy. Heads are trained on cached tokens, which stay on
the host; one batch at a time goes to the devices, split over the mesh by rows. Scores (mIoU, pixel
accuracy) come from a confusion matrix over all pixels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from supmim_jax import optim, sharding
from supmim_jax.config import IGNORED, HeadTrainingConfig
from supmim_jax.evals import features
from supmim_jax.evals.features import CannotEvaluate
from supmim_jax.models.segmentation import HEADS, pixel_cross_entropy
from supmim_jax.models.segmentation import classes as classes_of


class Scores(NamedTuple):
    """In per cent."""

    miou: float  # mean over the classes that have an IoU
    pixel_accuracy: float
    iou: list[float | None]  # by class; None: neither the truth nor a prediction has it


def count(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by (true class, predicted class), int64 VxV, without those that are IGNORED.

    Arrays of one shape, whatever it is; matrices of several batches add up.
    """
    valid = truth != IGNORED
    cell = truth[valid].astype(np.int64) * classes + predicted[valid]
    return np.bincount(cell, minlength=classes**2).reshape(classes, classes)


def score(matrix_VxV: np.ndarray) -> Scores:
    """Scores of all pixels counted."""
    if not matrix_VxV.sum():
        raise CannotEvaluate("No pixel of the masks counts: all are to be ignored.")
    right_V = np.diag(matrix_VxV)
    union_V = matrix_VxV.sum(axis=0) + matrix_VxV.sum(axis=1) - right_V
    there_V = union_V > 0
    iou_V = np.full(len(union_V), np.nan)
    iou_V[there_V] = 100.0 * right_V[there_V] / union_V[there_V]
    accuracy = 100.0 * right_V.sum() / matrix_VxV.sum()
    iou = [float(x) if there else None for x, there in zip(iou_V, there_V)]
    return Scores(float(np.nanmean(iou_V)), float(accuracy), iou)


class Segmenter(NamedTuple):
    """A trained head: `classify(params, tokens_BxHxWxD, masks_BxYxX)` gives classes int32 BxYxX."""

    classify: Callable[[Any, jax.Array, jax.Array], jax.Array]  # of masks it reads the size only
    params: Any  # replicated
    mesh: Mesh


def fit(
    tokens_NxHxWxD: np.ndarray,
    masks_NxYxX: np.ndarray,
    *,
    classes: int,
    head: str,
    training: HeadTrainingConfig,
    mesh: Mesh,
) -> Segmenter:
    """A head trained for exactly `training.steps` steps, the same on any mesh but for rounding.

    Args:
      tokens_NxHxWxD: frozen features, any float dtype, the same on every process.
      masks_NxYxX: integer labels of the image's pixels (or of any other size), cropped as the
        images were; IGNORED marks pixels that don't count.
      head: a key of HEADS.
    """
    width, whole = tokens_NxHxWxD.shape[-1], NamedSharding(mesh, sharding.REPLICATED)
    warmup = training.steps // 10
    schedule = optax.warmup_cosine_decay_schedule(
        0.0 if warmup else training.learning_rate, training.learning_rate, warmup, training.steps
    )
    solver = optax.adamw(schedule, weight_decay=training.weight_decay, mask=optim.decay_mask)

    def split(key) -> tuple[nnx.GraphDef, Any]:
        with nnx.use_eager_sharding(False):
            graph, params = nnx.split(HEADS[head](width, classes, rngs=nnx.Rngs(key)), nnx.Param)
        return graph, nnx.to_pure_dict(params)

    graph, _ = jax.eval_shape(split, jax.random.key(0))

    @jax.jit
    def step(carry, tokens, masks):
        def loss(params):
            return pixel_cross_entropy(nnx.merge(graph, params)(tokens), masks)

        params, state = carry
        updates, state = solver.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    def classify(params, tokens, masks):
        return classes_of(nnx.merge(graph, params)(tokens), masks.shape[1:])

    key = jax.random.key(training.seed)
    params = jax.jit(lambda: split(key)[1], out_shardings=whole)()
    carry = (params, jax.jit(solver.init, out_shardings=whole)(params))
    for batch in order(len(tokens_NxHxWxD), training):
        tokens, masks = tokens_NxHxWxD[batch], masks_NxYxX[batch]
        placed = _placed(tokens, masks, training.batch_size, mesh)
        # No queue of steps: simulated devices on few cores would wait for each other for ever.
        carry = step(jax.block_until_ready(carry), *placed)
    return Segmenter(jax.jit(classify, out_shardings=whole), carry[0], mesh)


def predict(
    segmenter: Segmenter, tokens_NxHxWxD: np.ndarray, size: tuple[int, int], batch_size: int
) -> np.ndarray:
    """The class of each pixel, int32 NxYxX, of images of `size`, `batch_size` of them at a time."""
    found = []
    for first in range(0, len(tokens_NxHxWxD), batch_size):
        tokens = tokens_NxHxWxD[first : first + batch_size]
        nothing = np.zeros((len(tokens), *size), np.int32)
        placed = _placed(tokens, nothing, batch_size, segmenter.mesh)
        found.append(np.asarray(segmenter.classify(segmenter.params, *placed))[: len(tokens)])
    return np.concatenate(found)


def order(count: int, training: HeadTrainingConfig) -> np.ndarray:
    """Examples of each step, a row each: one sequence, a new permutation every epoch."""
    total = training.steps * training.batch_size
    random = np.random.default_rng(training.seed)
    sequence = np.concatenate([random.permutation(count) for _ in range(-(-total // count))])
    return sequence[:total].reshape(training.steps, training.batch_size)


def _placed(tokens, masks, batch_size: int, mesh: Mesh) -> tuple[jax.Array, jax.Array]:
    """A batch on the mesh; the rows that fill it up have only pixels that are IGNORED."""
    size = features.round_up(batch_size, mesh.size)
    filler = np.full((size - len(masks), *masks.shape[1:]), IGNORED, np.int32)
    masks = np.concatenate([masks.astype(np.int32), filler])
    tokens = features.padded(tokens.astype(np.float32), size)
    return features.spread(tokens, mesh), features.spread(masks, mesh)
