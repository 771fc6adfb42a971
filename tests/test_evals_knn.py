"""Nearest neighbours against scikit-learn, to the bit on 1 and 8 devices; retrieval by hand."""

import jax
import numpy as np
import pytest
from conftest import make_clusters
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from supmim_jax import sharding
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import knn, retrieval

KS = (1, 5, 10, 20, 50)


def meshes():
    return (
        sharding.make_mesh(MeshConfig(), jax.devices()[:1]),
        sharding.make_mesh(MeshConfig(data=2, fsdp=4)),
    )


def signs(count: int, seed: int) -> np.ndarray:
    """Rows of +-1 in 16 dimensions: every product and sum of unit rows is exact, many are equal."""
    return np.random.default_rng(seed).choice([-1.0, 1.0], (count, 16)).astype(np.float32)


def test_neighbours_and_votes_are_those_of_scikit_learn():
    random = np.random.default_rng(0)
    bank, queries = random.normal(size=(700, 24)), random.normal(size=(150, 24))
    labels = random.integers(0, 7, 700)
    found = knn.neighbours(queries, bank, max(KS), query_chunk=128, bank_chunk=128)
    reference = NearestNeighbors(metric="cosine", algorithm="brute").fit(bank)
    distance, index = reference.kneighbors(queries, max(KS))
    assert (found.index_QxK == index).all()
    np.testing.assert_allclose(found.similarity_QxK, 1 - distance, atol=1e-6)

    votes = knn.vote(found.similarity_QxK, labels[found.index_QxK], KS, 0.07, 7)
    assert tuple(votes) == KS
    for k in KS:
        classifier = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        )
        assert (votes[k] == classifier.fit(bank, labels).predict(queries)).all()
    assert any((votes[1] != votes[k]).any() for k in KS)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_one_and_eight_devices_give_the_same_bits(leave_one_out):
    random = np.random.default_rng(1)
    bank = random.normal(size=(3000, 192)).astype(np.float32)
    bank[1500:2000] = bank[:500]
    queries = bank if leave_one_out else random.normal(size=(300, 192)).astype(np.float32)
    one, eight = (
        knn.neighbours(queries, bank, 30, mesh=mesh, leave_one_out=leave_one_out, bank_chunk=256)
        for mesh in meshes()
    )
    assert (one.index_QxK == eight.index_QxK).all()
    assert (one.similarity_QxK == eight.similarity_QxK).all()


@pytest.mark.parametrize("bank_chunk", [128, 512, 8192])
def test_of_equal_similarities_the_smaller_index_is_nearer(bank_chunk):
    bank = signs(1100, seed=0)
    bank[600:900] = bank[:300]
    for mesh in meshes():
        for queries, leave_one_out in ((signs(64, seed=1), False), (bank, True)):
            found = knn.neighbours(
                queries, bank, 100, mesh=mesh, leave_one_out=leave_one_out, bank_chunk=bank_chunk
            )
            similarity = queries @ bank.T / 16
            if leave_one_out:
                np.fill_diagonal(similarity, -np.inf)
            expected = np.argsort(-similarity, axis=1, kind="stable")[:, :100]
            assert (found.index_QxK == expected).all()
    assert (np.diff(found.similarity_QxK) == 0).mean() > 0.5


def test_an_example_is_not_its_own_neighbour():
    bank = np.random.default_rng(0).normal(size=(60, 8))
    found = knn.neighbours(bank, bank, 59, leave_one_out=True).index_QxK
    others = [np.delete(np.arange(60), i) for i in range(60)]  # and no padding
    assert (np.sort(found, axis=1) == others).all()
    assert (knn.neighbours(bank, bank, 1).index_QxK[:, 0] == np.arange(60)).all()


def test_classes_are_found_and_shuffled_labels_are_not():
    (bank, labels), (queries, truth) = make_clusters(500), make_clusters(400, seed=1)
    shuffled = np.random.default_rng(0).permutation(labels)
    options = {"classes": 5, "k": 20, "temperature": 0.07}
    assert (knn.predict(queries, bank, labels, **options) == truth).mean() == 1.0
    assert 0.05 < (knn.predict(queries, bank, shuffled, **options) == truth).mean() < 0.4


def test_the_program_at_imagenet_size_fits_16_gb_and_is_shared_by_devices():
    peaks = []
    for mesh in meshes():
        program = knn.search_program((50_000, 768), (1_281_167, 768), 200, mesh)
        memory = program.lowered.compile().memory_analysis()
        peaks.append(
            memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
        )
        assert program.calls == 49
    bank = 1_281_167 * 768 * 4
    assert bank < peaks[0] < 1.1 * bank < 16e9
    assert peaks[1] < bank / 8 + 0.1 * bank


def test_what_cannot_be_searched_is_refused():
    bank, broken = np.ones((10, 4)), np.ones((10, 4))
    broken[3, 2] = np.nan
    for arguments, message in (
        ((bank, bank, 11), r"k is 11; it must lie in \[1, 10\]"),
        ((np.ones((5, 3)), bank, 1), "3 dimensions, the bank 4"),
        ((bank, broken, 1), "bank of kNN has NaN or infinity in 1 of 10 rows, first in row 3"),
        ((np.ones((0, 4)), bank, 1), r"shape \(0, 4\)"),
    ):
        with pytest.raises(SetupError, match=message):
            knn.neighbours(*arguments)
    with pytest.raises(SetupError, match=r"\[1, 9\]"):
        knn.neighbours(bank, bank, 10, leave_one_out=True)
    with pytest.raises(SetupError, match=r"k = \[4\] .* \[1, 3\]"):
        knn.vote(np.ones((2, 3)), np.ones((2, 3), int), (1, 4), 0.07, 2)


def naive_map_at_r(index, queries, bank, leave_one_out) -> float:
    """mAP@R in per cent, a query and a rank at a time."""
    averages = []
    for i, label in enumerate(queries):
        r = sum(int(x) == label for x in bank) - (1 if leave_one_out else 0)
        if r == 0:
            continue
        hits, total = 0, 0.0
        for rank in range(1, r + 1):
            if bank[index[i][rank - 1]] == label:
                hits += 1
                total += hits / rank
        averages.append(total / r)
    return 100 * sum(averages) / len(averages)


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_retrieval_is_that_of_a_naive_loop(leave_one_out, monkeypatch):
    monkeypatch.setattr(retrieval, "CHUNK", 50)
    bank, labels = make_clusters(180, spread=2.0)
    labels[7] = 5  # the only one of its class: nothing to find
    queries, truth = (bank, labels) if leave_one_out else make_clusters(130, spread=2.0, seed=1)
    k = retrieval.depth(truth, labels, leave_one_out=leave_one_out, recalls=(1, 10))
    index = knn.neighbours(queries, bank, k, leave_one_out=leave_one_out).index_QxK
    options = {"leave_one_out": leave_one_out, "recalls": (1, 10)}
    scores = retrieval.score(index, truth, labels, **options)
    assert scores["map@r"] == pytest.approx(naive_map_at_r(index, truth, labels, leave_one_out))
    kept = truth != 5
    for recall in (1, 10):
        hit = [t in labels[row[:recall]] for row, t in zip(index[kept], truth[kept])]
        assert scores[f"recall@{recall}"] == pytest.approx(100 * np.mean(hit))
    assert 20 < scores["map@r"] < scores["recall@1"] < scores["recall@10"] <= 100
    with pytest.raises(SetupError, match=f"nearest {k} neighbours .* got {k - 1}"):
        retrieval.score(index[:, :-1], truth, labels, **options)


def test_retrieval_of_one_query_by_hand():
    bank = np.array([1, 0, 1, 0, 1])
    scores = retrieval.score(
        np.array([[1, 0, 2, 3, 4]]), np.array([1]), bank, leave_one_out=False, recalls=(1, 2)
    )
    assert scores["map@r"] == pytest.approx(100 * (1 / 2 + 2 / 3) / 3)
    assert (scores["recall@1"], scores["recall@2"]) == (0.0, 100.0)


def test_retrieval_of_separable_and_of_shuffled_classes():
    bank, labels = make_clusters(300)
    k = retrieval.depth(labels, labels, leave_one_out=True)
    index = knn.neighbours(bank, bank, k, leave_one_out=True).index_QxK
    assert set(retrieval.score(index, labels, labels, leave_one_out=True).values()) == {100.0}
    shuffled = np.random.default_rng(0).permutation(labels)
    scores = retrieval.score(index, shuffled, shuffled, leave_one_out=True)
    assert scores["recall@1"] < 30 and scores["map@r"] < 15 and scores["recall@100"] == 100.0
