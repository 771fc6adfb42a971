"""kNN against scikit-learn, and evaluation that doesn't depend on mesh or batch."""

import dataclasses

import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from supmim_jax import encoder as encoder_module
from supmim_jax import evals, sharding, train_step
from supmim_jax.config import EvalConfig, MeshConfig
from supmim_jax.data.loader import Dataset
from supmim_jax.evals import knn


@pytest.mark.parametrize(("query_chunk", "bank_chunk"), [(1024, 65536), (7, 33)])
def test_knn_votes_as_scikit_learn_does(query_chunk, bank_chunk):
    random = np.random.default_rng(0)
    bank, queries = random.normal(size=(200, 8)), random.normal(size=(60, 8))
    labels = random.integers(0, 5, 200)
    found = knn.predict(
        queries,
        bank,
        labels,
        classes=5,
        k=11,
        temperature=0.1,
        query_chunk=query_chunk,
        bank_chunk=bank_chunk,
    )
    reference = KNeighborsClassifier(
        11, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.1)
    )
    assert (found == reference.fit(bank, labels).predict(queries)).all()
    assert len(np.unique(found)) == 5


def test_a_near_neighbour_outvotes_many_far_ones():
    bank = np.array([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, 0.8]])
    votes = [
        knn.predict(
            np.array([[1.0, 0.05]]), bank, np.array([0, 1, 1, 1]), classes=2, k=4, temperature=t
        )
        for t in (0.05, 10.0)
    ]
    assert [int(v[0]) for v in votes] == [0, 1]


def test_evaluation_does_not_depend_on_mesh_or_batch(cfg, one_device):
    results = []
    for mesh, batch in ((one_device, 64), (one_device, 48), (MeshConfig(data=4, fsdp=2), 72)):
        mesh = sharding.make_mesh(mesh) if isinstance(mesh, MeshConfig) else mesh
        run = dataclasses.replace(cfg, eval=EvalConfig(batch_size=batch))
        params = train_step.build(run, mesh).init(jax.random.key(0)).params
        kernel = params["head"]["kernel"]  # zero to begin with: every image of class 0
        params["head"]["kernel"] = kernel + jax.random.normal(jax.random.key(1), kernel.shape)
        encoder = encoder_module.build_encoder(run, batch, mesh).bind(params)
        results.append(evals.run_all(encoder, Dataset(run), "validation[:200]", mesh).metrics)
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["knn"] < 100 and 0 <= results[0]["top1"] < 30
