"""Nearest neighbours against scikit-learn, to the bit on 1 and 8 devices; retrieval by hand."""

import numpy as np
import pytest
from conftest import make_clusters
from rivals.knn import IMAGENET, search_program
from sklearn.neighbors import KNeighborsClassifier, NearestNeighbors

from supmim_jax import sharding
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.evals import knn
from supmim_jax.rehearse import aot

KS = (1, 5, 10, 20, 50)


@pytest.fixture
def meshes(one_device):
    return one_device, sharding.make_mesh(MeshConfig(data=2, fsdp=4))


@pytest.mark.parametrize(
    ("chunks", "temperature"), [((128, 128), 0.07), ((1024, 65536), 0.1), ((7, 33), 0.1)]
)
def test_neighbours_and_votes_are_those_of_scikit_learn(meshes, monkeypatch, chunks, temperature):
    monkeypatch.setattr(knn, "QUERY_CHUNK", chunks[0])
    monkeypatch.setattr(knn, "BANK_CHUNK", chunks[1])
    random = np.random.default_rng(0)
    bank, queries = random.normal(size=(700, 24)), random.normal(size=(150, 24))
    labels = random.integers(0, 7, 700)
    found = knn.neighbours(queries, bank, max(KS), mesh=meshes[1])
    reference = NearestNeighbors(metric="cosine", algorithm="brute").fit(bank)
    distance, index = reference.kneighbors(queries, max(KS))
    assert (found.index_QxK == index).all()
    np.testing.assert_allclose(found.similarity_QxK, 1 - distance, atol=1e-6)

    votes = knn.vote(found.similarity_QxK, labels[found.index_QxK], KS, temperature, 7)
    assert tuple(votes) == KS
    for k in KS:
        classifier = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / temperature)
        )
        assert (votes[k] == classifier.fit(bank, labels).predict(queries)).all()
    assert any((votes[1] != votes[k]).any() for k in KS)


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_one_and_eight_devices_give_the_same_bits(meshes, monkeypatch, leave_one_out):
    monkeypatch.setattr(knn, "BANK_CHUNK", 256)
    random = np.random.default_rng(1)
    bank = random.normal(size=(3000, 192)).astype(np.float32)
    bank[1500:2000] = bank[:500]
    queries = bank if leave_one_out else random.normal(size=(300, 192)).astype(np.float32)
    one, eight = (
        knn.neighbours(queries, bank, 30, mesh=mesh, leave_one_out=leave_one_out) for mesh in meshes
    )
    assert (one.index_QxK == eight.index_QxK).all()
    assert (one.similarity_QxK == eight.similarity_QxK).all()


@pytest.mark.parametrize(("bank_chunk", "k"), [(128, 100), (512, 100), (8192, 100), (8192, 3)])
def test_of_equal_similarities_the_smaller_index_is_nearer(meshes, monkeypatch, bank_chunk, k):
    """Rows of +-1 in 16 dimensions: all products and sums of unit rows are exact, many equal."""
    monkeypatch.setattr(knn, "BANK_CHUNK", bank_chunk)
    bank, others = (
        np.random.default_rng(seed).choice([-1.0, 1.0], (count, 16)).astype(np.float32)
        for seed, count in enumerate((1100, 64))
    )
    bank[600:900] = bank[:300]
    for mesh in meshes:
        for queries, leave_one_out in ((others, False), (bank, True)):
            found = knn.neighbours(queries, bank, k, mesh=mesh, leave_one_out=leave_one_out)
            similarity = queries @ bank.T / 16
            if leave_one_out:
                np.fill_diagonal(similarity, -np.inf)
            expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
            assert (found.index_QxK == expected).all()
    assert (np.diff(found.similarity_QxK) == 0).mean() > 0.5


def test_an_example_is_not_its_own_neighbour(one_device):
    bank = np.random.default_rng(0).normal(size=(60, 8))
    found = knn.neighbours(bank, bank, 59, mesh=one_device, leave_one_out=True).index_QxK
    others = [np.delete(np.arange(60), i) for i in range(60)]  # and no padding
    assert (np.sort(found, axis=1) == others).all()
    assert (knn.neighbours(bank, bank, 1, mesh=one_device).index_QxK[:, 0] == np.arange(60)).all()


def test_there_may_be_fewer_queries_than_cores(one_device, monkeypatch):
    monkeypatch.setattr(knn, "CORES", 4)
    bank = np.random.default_rng(0).normal(size=(60, 8))
    found = knn.neighbours(bank[:3], bank, 60, mesh=one_device).index_QxK
    assert found[:, 0].tolist() == [0, 1, 2] and (np.sort(found, axis=1) == np.arange(60)).all()


def test_the_program_at_imagenet_size_fits_16_gb_and_is_shared_by_devices(meshes):
    peaks = []
    for mesh in meshes:
        lowered, calls = search_program(200, mesh)
        memory = aot.memory(lowered.compile())
        peaks.append(sum(memory.values()) - memory["code"])
        assert calls == 25
    bank = IMAGENET[0] * IMAGENET[2] * 4
    assert bank < peaks[0] < 1.1 * bank < 16e9
    assert peaks[1] < bank / 8 + 0.1 * bank


def test_features_that_are_not_finite_are_refused(one_device):
    bank, broken = np.ones((10, 4)), np.ones((10, 4))
    broken[3, 2] = np.nan
    for arguments in ((bank, broken), (broken, bank)):
        with pytest.raises(SetupError, match="1 of 10 rows, first in row 3"):
            knn.neighbours(*arguments, 1, mesh=one_device)


def naive_map_at_r(index, labels) -> float:
    """mAP@R in per cent, a query and a rank at a time."""
    averages = []
    for i, label in enumerate(labels):
        r = sum(x == label for x in labels) - 1
        if r:
            hits = [labels[j] == label for j in index[i][:r]]
            averages.append(
                sum(hit * sum(hits[: j + 1]) / (j + 1) for j, hit in enumerate(hits)) / r
            )
    return 100 * sum(averages) / len(averages)


def test_retrieval_is_that_of_a_naive_loop(one_device, monkeypatch):
    monkeypatch.setattr(knn, "QUERY_CHUNK", 50)
    bank, labels = make_clusters(180, spread=2.0)
    labels[7] = 5  # the only one of its class: nothing to find
    k = knn.retrieval_depth(labels, (1, 10))
    index = knn.neighbours(bank, bank, k, mesh=one_device, leave_one_out=True).index_QxK
    scores = knn.recall_and_map(index, labels, (1, 10))
    assert scores["map@r"] == pytest.approx(naive_map_at_r(index, labels))
    kept = labels != 5
    for recall in (1, 10):
        hit = [t in labels[row[:recall]] for row, t in zip(index[kept], labels[kept])]
        assert scores[f"recall@{recall}"] == pytest.approx(100 * np.mean(hit))
    assert 20 < scores["map@r"] < scores["recall@1"] < scores["recall@10"] <= 100
    with pytest.raises(SetupError):
        knn.retrieval_depth(np.arange(5), (1,))
