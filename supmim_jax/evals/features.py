"""Features of a whole split on the host, and host arrays spread over all devices of a mesh.

Evaluators take host arrays and spread their rows over the devices again, the same number on each,
so that a result does not depend on the mesh that computed the features.
"""

from collections.abc import Iterable
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


def by_rows(mesh: Mesh) -> NamedSharding:
    """The first axis split over every axis of the mesh, in the order of its devices."""
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def spread(x: np.ndarray, mesh: Mesh) -> jax.Array:
    """`x`, the same on every process, split by rows; the mesh must divide their number."""
    return sharding.put(x, jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_rows(mesh)))


def padded(x: np.ndarray, rows: int) -> np.ndarray:
    """`x` with zeros below it, `rows` rows in all."""
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)])


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def check_finite(features_NxD: np.ndarray, what: str) -> None:
    """Raises CannotEvaluate if a value is NaN or infinite."""
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~np.isfinite(features_NxD.sum(axis=1, dtype=np.float64)))
    if len(bad):
        raise CannotEvaluate(
            f"{what} has NaN or infinity in {len(bad)} of {len(features_NxD)} rows, first in row "
            f"{bad[0]}. Has the training diverged?"
        )


class Extracted(NamedTuple):
    pooled: np.ndarray  # float32 NxD
    label: np.ndarray  # int32 N
    id: np.ndarray  # int32 N
    prediction: np.ndarray | None  # int32 N, the classifier's class where there is one


def extract(encoder: Encoder, batches: Iterable[Batch]) -> Extracted:
    """Features of every example that is not padding, in the order of the batches."""
    rows = []
    for batch in batches:
        found = encoder.features(batch.views[0])
        arrays = [batch.weight, found.pooled, batch.label, batch.id]
        if found.logits is not None:
            arrays.append(found.logits.argmax(-1).astype(np.int32))
        weight, *arrays = on_host(tuple(arrays))
        rows.append([x[weight > 0] for x in arrays])
    pooled, label, number, *prediction = map(np.concatenate, zip(*rows))
    return Extracted(pooled, label, number, prediction[0] if prediction else None)


def on_host(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Whole global arrays as numpy, on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return tuple(np.asarray(x) for x in arrays)
