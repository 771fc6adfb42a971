"""Features of a whole split, gathered on the host."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from supmim_jax.types import Batch, Encoder


class Extracted(NamedTuple):
    pooled: np.ndarray  # float32 NxD
    prediction: np.ndarray  # int32 N, the classifier's class
    label: np.ndarray  # int32 N


def extract(encoder: Encoder, batches: Iterable[Batch]) -> Extracted:
    """Features of every example that is not padding, in the order of the batches."""
    rows = []
    for batch in batches:
        found = encoder.features(batch.views[0])
        prediction = found.logits.argmax(-1).astype(np.int32)
        arrays = on_host((found.pooled, prediction, batch.label, batch.weight))
        rows.append([x[arrays[-1] > 0] for x in arrays[:-1]])
    return Extracted(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def on_host(arrays: tuple[jax.Array, ...]) -> tuple[np.ndarray, ...]:
    """Whole global arrays as numpy, on every process."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return tuple(np.asarray(x) for x in arrays)
