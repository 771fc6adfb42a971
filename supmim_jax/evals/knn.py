"""Weighted k-nearest-neighbour classification, exact, with bounded memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def predict(
    queries_QxD: np.ndarray,
    bank_NxD: np.ndarray,
    labels_N: np.ndarray,
    *,
    classes: int,
    k: int,
    temperature: float,
    query_chunk: int = 1024,
    bank_chunk: int = 65536,
) -> np.ndarray:
    """Class of each query, int32 Q, by its k most similar examples of the bank.

    Similarity is the cosine s; a neighbour votes for its label with exp(s / temperature), as in
    Wu et al. (arXiv 1805.01978, section 3.4). Of equal similarities the earlier row of the bank
    is nearer; of equal votes the smaller class wins. Bank and queries go through the device in
    chunks; at most query_chunk x (bank_chunk + k) similarities exist at once.
    """
    votes = []
    for start in range(0, len(queries_QxD), query_chunk):
        chunk = _normalized(queries_QxD[start : start + query_chunk])
        best = (np.full((len(chunk), k), -np.inf, np.float32), np.zeros((len(chunk), k), np.int32))
        for first in range(0, len(bank_NxD), bank_chunk):
            rows = _normalized(bank_NxD[first : first + bank_chunk])
            labels = labels_N[first : first + bank_chunk]
            best = _merge(best, chunk, rows, labels.astype(np.int32), k)
        votes.append(np.asarray(_vote(*best, classes, temperature)))
    return np.concatenate(votes)


def _normalized(x: np.ndarray) -> np.ndarray:
    return (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=4)
def _merge(best, queries, rows, labels, k: int):
    """The k best (similarity, label) of those so far and of these rows, earlier rows first."""
    similarity = jnp.matmul(queries, rows.T, precision=jax.lax.Precision.HIGHEST)
    similarity = jnp.concatenate([best[0], similarity], axis=1)
    labels = jnp.broadcast_to(labels, (len(queries), len(labels)))
    labels = jnp.concatenate([best[1], labels], axis=1)
    top, where = jax.lax.top_k(similarity, k)
    return top, jnp.take_along_axis(labels, where, axis=1)


@functools.partial(jax.jit, static_argnums=2)
def _vote(similarity_QxK, labels_QxK, classes: int, temperature):
    # Relative to the nearest: exp(s / 0.07) alone would be fine, a small temperature would not.
    weight = jnp.exp((similarity_QxK - similarity_QxK[:, :1]) / temperature)
    votes = jax.vmap(lambda label, w: jnp.zeros(classes).at[label].add(w))(labels_QxK, weight)
    return votes.argmax(-1).astype(jnp.int32)
