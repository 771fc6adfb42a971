"""Features of a whole split on the host, and host arrays spread over all devices of a mesh.

Evaluators take host arrays and spread their rows again, each device with the same number of them,
so that a result does not depend on the mesh that the features came from.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax import sharding
from supmim_jax.batch import Batch, Encoder
from supmim_jax.errors import SetupError

ERRORS = "errors"  # in results.json, where there are any


class CannotEvaluate(SetupError):
    """One evaluation cannot be made of what was read, which is the same on all processes."""


class Results(NamedTuple):
    metrics: dict[str, float]
    details: dict[str, Any]  # by evaluation: what is no metric, ready for JSON
    errors: dict[str, str] = {}  # why an evaluation could not be made, by its name


def everywhere() -> Mesh:
    """All devices of this run on one axis."""
    axis = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.device_count(),), ("rows",), axis_types=axis)


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over every axis of the mesh, in the order of its devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def whole(mesh: Mesh) -> NamedSharding:
    """All of an array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """`x`, the same on every process, split by rows; the mesh must divide their number."""
    return sharding.put(x, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows(mesh)))


def copied(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """`x`, the same on every process, whole on every device."""
    return sharding.put(x, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole(mesh)))


def padded(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zeros below it, `rows` rows in all."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_features(features_NxD: np.ndarray, what: str) -> None:
    """Raises SetupError unless these are finite numbers, a row for each of N > 0 examples."""
    if features_NxD.ndim != 2 or not features_NxD.size:
        raise CannotEvaluate(
            f"{what} must be a row per example and a column per dimension, got an array of shape "
            f"{features_NxD.shape}."
        )
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(features_NxD.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise CannotEvaluate(
            f"{what} has NaN or infinity in {len(bad)} of {len(features_NxD)} rows, first in row "
            f"{bad[0]}. Has the training diverged?"
        )


def check_labels(labels_N: np.ndarray, features_NxD: np.ndarray, classes: int, what: str) -> None:
    """Raises SetupError unless there is one integer label in [0, classes) for each example."""
    if labels_N.shape != features_NxD.shape[:1] or not np.issubdtype(labels_N.dtype, np.integer):
        raise CannotEvaluate(
            f"{what} must have an integer for each of {len(features_NxD)} examples, got "
            f"{labels_N.dtype} {labels_N.shape}."
        )
    if labels_N.min() < 0 or labels_N.max() >= classes:
        raise CannotEvaluate(
            f"{what} must lie in [0, {classes}), got {labels_N.min()} to {labels_N.max()}."
        )


class Extracted(NamedTuple):
    pooled: np.ndarray  # float32 NxD
    prediction: np.ndarray | None  # int32 N, the classifier's class where there is one
    label: np.ndarray  # int32 N
    id: np.ndarray  # int32 N


def extract(encoder: Encoder, batches: Iterable[Batch]) -> Extracted:
    """Features of every example that is not padding, in the order of the batches."""
    pooled, predictions, labels, ids = [], [], [], []
    for batch in batches:
        found = encoder.features(batch.views[0])
        x, label, number, weight = on_host((found.pooled, batch.label, batch.id, batch.weight))
        pooled.append(x[weight > 0])
        labels.append(label[weight > 0])
        ids.append(number[weight > 0])
        if found.logits is not None:
            (prediction,) = on_host((found.logits.argmax(-1).astype(np.int32),))
            predictions.append(prediction[weight > 0])
    prediction = np.concatenate(predictions) if predictions else None
    return Extracted(np.concatenate(pooled), prediction, *map(np.concatenate, (labels, ids)))


def extract_tokens(
    encoder: Encoder, batches: Iterable[Batch]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Tokens float16 BxHxWxD (256 times the pooled features) and masks, without padding."""
    for batch in batches:
        tokens, mask, weight = on_host(
            (encoder.features(batch.views[0]).tokens, batch.masks, batch.weight)
        )
        yield tokens[weight > 0].astype(np.float16), mask[weight > 0]


def first_rows(
    batches: Iterable[tuple[np.ndarray, np.ndarray]], most: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first `most` rows of the batches, or all."""
    kept, count = [], 0
    for batch in batches:
        kept.append(batch)
        count += len(batch[0])
        if count >= most:
            break
    tokens, masks = (np.concatenate(parts)[:most] for parts in zip(*kept))
    return tokens, masks


def on_host(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Whole global arrays as numpy, on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return tuple(np.asarray(x) for x in arrays)
