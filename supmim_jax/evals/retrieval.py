"""Image retrieval by nearest neighbours: Recall@k and mAP@R.

As in Musgrave et al., "A Metric Learning Reality Check" (arXiv 2003.08505, section 2.1 and its
appendix): every example searches all others, and its R is the number of others of its class. An
example with R = 0, the only one of its class, has nothing to find and is left out of the means.
"""

from collections.abc import Sequence

import numpy as np

from supmim_jax.evals.features import CannotEvaluate

CHUNK = 1024  # queries at once


def depth(labels_N: np.ndarray, recalls: Sequence[int]) -> int:
    """How many neighbours `score` needs: the largest R or recall, at most all other examples.

    Raises:
      CannotEvaluate: there is nothing to find.
    """
    most = int(np.bincount(labels_N).max()) - 1
    if not most:
        raise CannotEvaluate("Retrieval has nothing to find: no two examples share a label.")
    return min(len(labels_N) - 1, max(most, *recalls))


def score(index_NxK: np.ndarray, labels_N: np.ndarray, recalls: Sequence[int]) -> dict[str, float]:
    """{"recall@k", ..., "map@r"} in per cent.

    Recall@k is the share of queries with their label among the nearest k. mAP@R is the mean over
    queries of 1/R * sum over ranks i <= R of precision at i, where rank i has the query's label.

    Args:
      index_NxK: the other examples, the nearest first; K is `depth`.
    """
    found_N = np.bincount(labels_N)[labels_N] - 1  # R
    counts = np.flatnonzero(found_N > 0)
    depth_K = np.arange(1, index_NxK.shape[1] + 1)
    first_hit, averages = [], []
    for start in range(0, len(counts), CHUNK):
        part = counts[start : start + CHUNK]
        hit_QxK = labels_N[index_NxK[part]] == labels_N[part, None]
        precision_QxK = hit_QxK.cumsum(axis=1) / depth_K
        counted_QxK = hit_QxK & (depth_K <= found_N[part, None])
        averages.append((precision_QxK * counted_QxK).sum(axis=1) / found_N[part])
        first_hit.append(np.where(hit_QxK.any(axis=1), hit_QxK.argmax(axis=1), hit_QxK.shape[1]))
    rank_Q = np.concatenate(first_hit)
    scores = {f"recall@{k}": 100.0 * float((rank_Q < k).mean()) for k in recalls}
    return scores | {"map@r": 100.0 * float(np.concatenate(averages).mean())}
