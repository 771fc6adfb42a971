"""Exact nearest neighbours by cosine, the vote of the nearest k, and image retrieval.

The search is sharded over a mesh. The bank is normalised once and stays on the devices, split by
rows: 1.28 M x 768 float32 are 3.9 GB in all, and sending them from the host for each chunk of
queries would take longer than the products. One program searches for a chunk of queries: a scan
over chunks of the bank keeps the best k so far, and then the best k of all devices are merged.
Where the mesh is a single CPU, XLA computes the products and NumPy chooses: XLA's top_k would take
longer than the products.

All products have one shape, query chunk x bank chunk, and a row of the bank always has the same
place in its chunk. So 1 and 8 devices give the same bits (checked on CPU; a GPU that tunes its
kernels for each program may still round differently).
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from supmim_jax import sharding
from supmim_jax.evals import features

# Most rows in one product: memory depends on them, results only as far as products round.
QUERY_CHUNK, BANK_CHUNK = 2048, 8192  # 64 MiB of similarities; one CPU holds two of them
# Whole numbers of a kernel's tiles, so that a row's place can't matter.
LEAST_QUERIES, LEAST_CHUNK = 16, 128
ROWS = 64  # compared at a time, so that the result stays in a core's cache
CORES = os.cpu_count() or 1
NOWHERE = np.iinfo(np.int32).max  # index of a neighbour not found yet


class Neighbours(NamedTuple):
    """The nearest first; of equal similarities the smaller index is nearer."""

    similarity_QxK: np.ndarray  # float32 cosine
    index_QxK: np.ndarray  # int32 row of the bank


def neighbours(
    queries_QxD: np.ndarray,
    bank_NxD: np.ndarray,
    k: int,
    *,
    mesh: Mesh,
    leave_one_out: bool = False,
) -> Neighbours:
    """The k rows of the bank that are most similar to each query, exactly.

    Args:
      queries_QxD, bank_NxD: any float dtype, the same on every process; a zero row is similar
        to nothing (cosine 0).
      mesh: whose devices share the bank.
      leave_one_out: queries are the bank, and row i is no neighbour of query i.

    Raises:
      CannotEvaluate: features are not finite.
    """
    features.check_finite(queries_QxD, "queries of kNN")
    features.check_finite(bank_NxD, "bank of kNN")
    query_chunk = _chunk(len(queries_QxD), QUERY_CHUNK, LEAST_QUERIES)
    bank = _placed(bank_NxD, _chunk(len(bank_NxD), BANK_CHUNK, LEAST_CHUNK), mesh)
    options = {"k": k, "size": len(bank_NxD), "leave_one_out": leave_one_out}
    found = []
    for first in range(0, len(queries_QxD), query_chunk):
        chunk = queries_QxD[first : first + query_chunk]
        host = (_normalised(chunk, query_chunk), np.asarray(first, np.int32))
        queries = sharding.put(host, sharding.replicated(host, mesh))
        if isinstance(bank, np.ndarray):
            numbers = np.arange(first, first + len(chunk))
            best = _search_on_host(queries[0], numbers, bank, **options)
        else:
            best = _search(*queries, bank, mesh=mesh, **options)
        found.append([np.asarray(x)[: len(chunk)] for x in best])
    return Neighbours(*(np.concatenate(parts) for parts in zip(*found)))


def vote(
    similarity_QxK: np.ndarray,
    labels_QxK: np.ndarray,
    ks: Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, np.ndarray]:
    """Class of each query, int32 Q, by its nearest k neighbours, for each k.

    A neighbour votes for its label with exp(similarity / temperature), as in Wu et al. (arXiv
    1805.01978, section 3.4). Of equal votes the smaller class wins.
    """
    # Relative to the nearest: exp(s / 0.07) alone would be fine, a small temperature would not.
    nearest = similarity_QxK[:, :1].astype(np.float64)
    weight_QxK = np.exp((similarity_QxK - nearest) / temperature)
    winners = {k: np.empty(len(labels_QxK), np.int32) for k in ks}
    for first in range(0, len(labels_QxK), QUERY_CHUNK):
        part = slice(first, first + QUERY_CHUNK)
        labels, weight = labels_QxK[part], weight_QxK[part]
        cell = np.arange(len(labels))[:, None] * classes + labels
        votes, counted = np.zeros(len(labels) * classes), 0
        for k in sorted(set(ks)):
            new = slice(counted, k)
            votes += np.bincount(cell[:, new].ravel(), weight[:, new].ravel(), len(votes))
            winners[k][part] = votes.reshape(len(labels), classes).argmax(axis=1)
            counted = k
    return winners


def retrieval_depth(labels_N: np.ndarray, recalls: Sequence[int]) -> int:
    """How many neighbours `recall_and_map` needs: the largest R or recall, at most all others.

    Raises:
      CannotEvaluate: there is nothing to find.
    """
    most = int(np.bincount(labels_N).max()) - 1
    if not most:
        raise features.CannotEvaluate(
            "Retrieval has nothing to find: no two examples share a label."
        )
    return min(len(labels_N) - 1, max(most, *recalls))


def recall_and_map(
    index_NxK: np.ndarray, labels_N: np.ndarray, recalls: Sequence[int]
) -> dict[str, float]:
    """{"recall@k", ..., "map@r"} in per cent, of every example searching all others.

    As in Musgrave et al., "A Metric Learning Reality Check" (arXiv 2003.08505, section 2.1 and its
    appendix). The R of an example is the number of others of its class. An example with R = 0, the
    only one of its class, has nothing to find and is left out of the means.

    Recall@k is the share of queries with their label among the nearest k. mAP@R is the mean over
    queries of 1/R * sum over ranks i <= R of precision at i, where rank i has the query's label.

    Args:
      index_NxK: the other examples, the nearest first; K is `retrieval_depth`.
    """
    found_N = np.bincount(labels_N)[labels_N] - 1  # R
    counts = np.flatnonzero(found_N > 0)
    depth_K = np.arange(1, index_NxK.shape[1] + 1)
    first_hit, averages = [], []
    for start in range(0, len(counts), QUERY_CHUNK):
        part = counts[start : start + QUERY_CHUNK]
        hit_QxK = labels_N[index_NxK[part]] == labels_N[part, None]
        precision_QxK = hit_QxK.cumsum(axis=1) / depth_K
        counted_QxK = hit_QxK & (depth_K <= found_N[part, None])
        averages.append((precision_QxK * counted_QxK).sum(axis=1) / found_N[part])
        first_hit.append(np.where(hit_QxK.any(axis=1), hit_QxK.argmax(axis=1), hit_QxK.shape[1]))
    rank_Q = np.concatenate(first_hit)
    scores = {f"recall@{k}": 100.0 * float((rank_Q < k).mean()) for k in recalls}
    return scores | {"map@r": 100.0 * float(np.concatenate(averages).mean())}


@functools.partial(jax.jit, static_argnames=("k", "size", "leave_one_out", "mesh"))
def _search(queries_QxD, first, bank_CxNxD, *, k: int, size: int, leave_one_out: bool, mesh: Mesh):
    """The k best (similarity, index) of `size` rows for the queries first, first + 1, ..."""
    axes = mesh.axis_names

    def on_device(queries_QxD, first, bank_CxNxD):
        query = first + jnp.arange(len(queries_QxD), dtype=jnp.int32)
        start = jax.lax.axis_index(axes) * len(bank_CxNxD)

        def nearer(best, numbered):
            number, rows_NxD = numbered
            offset = number * len(rows_NxD)
            index = offset + jnp.arange(len(rows_NxD), dtype=jnp.int32)
            similarity = jnp.matmul(queries_QxD, rows_NxD.T, precision=jax.lax.Precision.HIGHEST)
            hidden = jnp.broadcast_to(index >= size, similarity.shape)
            if leave_one_out:
                hidden |= index == query[:, None]
            similarity = jnp.where(hidden, -jnp.inf, similarity)
            similarity, row = _candidates(similarity, k)
            # top_k keeps the order of equals: those so far first, they have smaller indices.
            top, where = jax.lax.top_k(jnp.concatenate([best[0], similarity], axis=1), k)
            before = jnp.take_along_axis(best[1], jnp.minimum(where, k - 1), axis=1)
            found = offset + row(jnp.maximum(where - k, 0))
            return (top, jnp.where(where < k, before, found)), None

        shape = (len(queries_QxD), k)
        none = (jnp.full(shape, -jnp.inf), jnp.full(shape, NOWHERE, jnp.int32))
        numbers = start + jnp.arange(len(bank_CxNxD), dtype=jnp.int32)
        best, _ = jax.lax.scan(nearer, none, (numbers, bank_CxNxD))
        # In the order of the devices, and so of the indices.
        similarity, index = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in best)
        top, where = jax.lax.top_k(similarity, k)
        return top, jnp.take_along_axis(index, where, axis=1)

    whole = PartitionSpec()
    return jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(whole, whole, PartitionSpec(axes)),
        out_specs=(whole, whole),
        check_vma=False,  # it cannot see that the merged best are the same on every device
    )(queries_QxD, first, bank_CxNxD)


def _search_on_host(
    queries_QxD: jax.Array,
    numbers_Q: np.ndarray,
    bank_CxNxD: np.ndarray,
    *,
    k: int,
    size: int,
    leave_one_out: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """As `_search`, for a single CPU, whose cores share the queries of these numbers."""
    parts = np.array_split(numbers_Q, min(CORES, len(numbers_Q)))
    bounds = np.cumsum([0, *map(len, parts)])
    best = [np.full((len(part), k), NOTHING) for part in parts]
    following = _similarity(queries_QxD, jax.device_put(bank_CxNxD[0]))
    with ThreadPoolExecutor(CORES) as pool:
        for number in range(len(bank_CxNxD)):
            similarity = np.asarray(following)
            if number + 1 < len(bank_CxNxD):  # computed while these are looked at
                following = _similarity(queries_QxD, jax.device_put(bank_CxNxD[number + 1]))
            offset = number * similarity.shape[1]
            real = similarity[:, : size - offset]
            chunks = [real[a:b] for a, b in itertools.pairwise(bounds)]
            own = [part - offset if leave_one_out else None for part in parts]
            best = list(pool.map(_nearer, best, chunks, [offset] * len(parts), own))
    return _from_keys(np.sort(np.concatenate(best), axis=1))


@jax.jit
def _similarity(queries_QxD: jax.Array, rows_NxD: jax.Array) -> jax.Array:
    return jnp.matmul(queries_QxD, rows_NxD.T, precision=jax.lax.Precision.HIGHEST)


def _nearer(
    best_QxK: np.ndarray, similarity_QxN: np.ndarray, offset: int, own_Q: np.ndarray | None
) -> np.ndarray:
    """Keys of the k best of those so far and of a chunk, without each query's row `own_Q`.

    The k-th is the last of them, the others are in no order. Only what is nearer than the k-th so
    far is looked at. Before there are k, a bound takes its place: k + 1 rows of the chunk, of which
    one may be the query itself, are at least as near.
    """
    (queries, entries), k = similarity_QxN.shape, best_QxK.shape[1]
    last, _ = _from_keys(best_QxK[:, -1:])
    least = np.nextafter(last, np.float32(np.inf))
    if np.isneginf(last).any():
        size = max(entries // max(3 * (k + 1), 256), 1)  # of groups: their maxima are fewer
        groups = entries // size
        grouped = similarity_QxN[:, : size * groups].reshape(queries, size, groups).max(axis=1)
        among = max(groups - (k + 1), 0)
        least = np.maximum(least, np.partition(grouped, among, axis=1)[:, among, None])
    nearer = [
        at * entries + np.flatnonzero(similarity_QxN[at : at + ROWS] >= least[at : at + ROWS])
        for at in range(0, queries, ROWS)
    ]
    row, column = np.divmod(np.concatenate(nearer), entries)
    if own_Q is not None:
        other = column != own_Q[row]
        row, column = row[other], column[other]
    counts = np.bincount(row, minlength=queries)
    place = k + np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    keys = np.pad(best_QxK, ((0, 0), (0, counts.max(initial=0))), constant_values=NOTHING)
    keys[row, place] = _keys(similarity_QxN[row, column], offset + column)
    return np.partition(keys, k - 1, axis=1)[:, :k]


def _keys(similarity: np.ndarray, index: np.ndarray) -> np.ndarray:
    """int64 numbers, smaller for the nearer, of equally near ones for the smaller index.

    The upper half orders as the float32 do, negated; -0 is below 0, as top_k has it. To sort such
    keys takes NumPy a fraction of the time of a stable sort with indices.
    """
    bits = similarity.view(np.int32)
    ascending = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return ~ascending.astype(np.int64) << 32 | index


def _from_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The similarities, float32, and indices, int32, that `_keys` was given."""
    ascending = ~(keys >> 32).astype(np.int32)
    similarity = (ascending ^ ((ascending >> 31) & 0x7FFFFFFF)).view(np.float32)
    return similarity, keys.astype(np.int32)


NOTHING = _keys(np.float32([-np.inf]), np.int64([NOWHERE]))[0]


def _candidates(x_QxN: jax.Array, k: int) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """Entries among which the k largest of each row are, in order; and their columns by place.

    Where N >> k these are few, so that top_k has less to sort: groups of neighbours are looked at,
    and only the k whose maxima are largest, of equal maxima the first, can hold any of the k.
    """
    queries, entries = x_QxN.shape
    size = min(LEAST_CHUNK, 1 << int(math.log2(max(1.0, math.sqrt(entries / k)))))
    if size < 16:  # to gather them would cost more than it saves
        return x_QxN, lambda place: place
    grouped = x_QxN.reshape(queries, -1, size)
    groups_QxK = jnp.sort(jax.lax.top_k(grouped.max(axis=2), k)[1], axis=1)
    among = jnp.take_along_axis(grouped, groups_QxK[..., None], axis=1)

    def column(place):
        return jnp.take_along_axis(groups_QxK, place // size, axis=1) * size + place % size

    return among.reshape(queries, -1), column


def _placed(bank_NxD: np.ndarray, chunk: int, mesh: Mesh) -> jax.Array | np.ndarray:
    """The normalised bank, CxNxD: C chunks of N rows, zeros at the end.

    It is on the mesh; where that is a single CPU, it is a host array, whose chunks XLA reads where
    they are.
    """
    chunks = features.round_up(-(-len(bank_NxD) // chunk), mesh.size)
    shape = (chunks, chunk, bank_NxD.shape[1])

    def part(span) -> np.ndarray:
        first, stop, _ = span[0].indices(chunks)
        block = np.empty((stop - first, *shape[1:]), np.float32)
        rows = [bank_NxD[i * chunk : (i + 1) * chunk] for i in range(first, stop)]
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(_normalised, rows, [chunk] * len(block), block))
        return block

    if mesh.size == 1 and mesh.devices.item().platform == "cpu":
        return part((slice(None),))
    return jax.make_array_from_callback(shape, features.by_rows(mesh), part)


def _chunk(total: int, most: int, least: int) -> int:
    """Rows in each of as few chunks as `most` allows; not of the number of devices.

    Chunks of equal size leave little to padding: 10,000 rows are 2 x 5,120, not 2 x 8,192.
    """
    return features.round_up(-(-total // -(-total // most)), least)


def _normalised(x_NxD: np.ndarray, rows: int, out: np.ndarray | None = None) -> np.ndarray:
    """Float32 rows of length 1, with zeros below, `rows` in all; in `out` if given."""
    x_NxD = np.asarray(x_NxD, np.float32)
    out = np.empty((rows, x_NxD.shape[1]), np.float32) if out is None else out
    length = np.sqrt(np.einsum("nd,nd->n", x_NxD, x_NxD))  # one pass, where a norm takes three
    np.divide(x_NxD, np.maximum(length, 1e-12)[:, None], out=out[: len(x_NxD)])
    out[len(x_NxD) :] = 0
    return out
