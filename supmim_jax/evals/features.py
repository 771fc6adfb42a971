"""Features of a whole split, gathered on the host."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from supmim_jax.types import Batch, Encoder


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
