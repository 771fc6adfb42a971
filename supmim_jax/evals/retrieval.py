"""Image retrieval from nearest neighbours: Recall@k and mAP@R.

As in Musgrave et al., "A Metric Learning Reality Check" (arXiv 2003.08505, section 2.1 and its
appendix): a query's R is the number of examples of its class that there are to find. A query with
R = 0, the only example of its class, has nothing to find and counts in no mean.
"""

from collections.abc import Sequence

import numpy as np

from supmim_jax.evals.features import CannotEvaluate

RECALLS = (1, 10, 100)
CHUNK = 1024  # queries at once


def relevant(
    query_labels_Q: np.ndarray, bank_labels_N: np.ndarray, leave_one_out: bool
) -> np.ndarray:
    """R of each query: rows of the bank with its label, less itself with leave_one_out."""
    classes = 1 + max(query_labels_Q.max(), bank_labels_N.max())
    counts_V = np.bincount(bank_labels_N, minlength=classes)
    return counts_V[query_labels_Q] - int(leave_one_out)


def depth(
    query_labels_Q: np.ndarray,
    bank_labels_N: np.ndarray,
    *,
    leave_one_out: bool,
    recalls: Sequence[int] = RECALLS,
) -> int:
    """The k of `knn.neighbours` that `score` needs: the largest R and recall, or the whole bank."""
    most = int(relevant(query_labels_Q, bank_labels_N, leave_one_out).max())
    return min(len(bank_labels_N) - int(leave_one_out), max(most, *recalls))


def score(
    index_QxK: np.ndarray,
    query_labels_Q: np.ndarray,
    bank_labels_N: np.ndarray,
    *,
    leave_one_out: bool,
    recalls: Sequence[int] = RECALLS,
) -> dict[str, float]:
    """{"recall@k", ..., "map@r"} in per cent.

    Recall@k is the share of queries with their label among the nearest k. mAP@R is the mean over
    queries of 1/R * sum over ranks i <= R of precision at i, where rank i has the query's label.

    Args:
      index_QxK: rows of the bank, the nearest first, at least `depth` of them.
      leave_one_out: the queries are the bank, and no query is among its own neighbours.

    Raises:
      SetupError: too few neighbours, or no query has anything to find.
    """
    wanted = depth(query_labels_Q, bank_labels_N, leave_one_out=leave_one_out, recalls=recalls)
    if index_QxK.shape[1] < wanted:
        raise CannotEvaluate(
            f"Retrieval needs the nearest {wanted} neighbours of each query (its recalls and its "
            f"largest class), got {index_QxK.shape[1]}."
        )
    found_Q = relevant(query_labels_Q, bank_labels_N, leave_one_out)
    counts = np.flatnonzero(found_Q > 0)
    if not len(counts):
        raise CannotEvaluate("Retrieval has nothing to find: no two examples share a label.")
    first_hit, precision = [], []
    for start in range(0, len(counts), CHUNK):
        part = counts[start : start + CHUNK]
        hit_QxK = bank_labels_N[index_QxK[part]] == query_labels_Q[part, None]
        precision.append(_average_precision(hit_QxK, found_Q[part]))
        first_hit.append(np.where(hit_QxK.any(axis=1), hit_QxK.argmax(axis=1), hit_QxK.shape[1]))
    rank_Q = np.concatenate(first_hit)
    scores = {f"recall@{k}": 100.0 * float((rank_Q < k).mean()) for k in recalls}
    return scores | {"map@r": 100.0 * float(np.concatenate(precision).mean())}


def _average_precision(hit_QxK: np.ndarray, found_Q: np.ndarray) -> np.ndarray:
    """Average precision at R of each query, float64 Q."""
    rank_K = np.arange(1, hit_QxK.shape[1] + 1)
    precision_QxK = hit_QxK.cumsum(axis=1) / rank_K
    counted_QxK = hit_QxK & (rank_K <= found_Q[:, None])
    return (precision_QxK * counted_QxK).sum(axis=1) / found_Q
