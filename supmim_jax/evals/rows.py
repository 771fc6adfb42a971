"""Rows of host arrays over all devices of a mesh, each device with the same number of them."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from supmim_jax import sharding
from supmim_jax.evals.results import CannotEvaluate


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
