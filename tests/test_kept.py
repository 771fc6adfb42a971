"""What earlier versions wrote still opens: a data set, a token cache and a run's checkpoint."""

import json
import tarfile
from pathlib import Path

import jax
import pytest

from supmim_jax import probe
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import InitConfig, TokensConfig, changed
from supmim_jax.config.configdict import from_configdict
from supmim_jax.train import train

KEPT = Path(__file__).parent / "kept"


@pytest.fixture(params=sorted(x.name for x in KEPT.iterdir()))
def kept(request, tmp_path):
    with tarfile.open(KEPT / request.param) as archive:
        safely = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4
        archive.extractall(tmp_path, **safely)
    return tmp_path


def test_a_run_of_an_earlier_version_is_probed_and_trained_on(kept):
    one = jax.devices()[:1]
    results = json.loads((kept / "run" / "results.json").read_text())
    saved = from_configdict(json.loads((kept / "run" / "config.json").read_text()))
    data = {"data_dir": str(kept / "data")}
    asked = changed(probe.own(saved), data=data)
    found = probe.probe(Checkpoint.open(str(kept / "run")), asked, one)
    assert found.results.metrics == {name: results[name] for name in ("top1", "knn")}

    cfg = changed(
        saved,
        data=data,
        tokens=TokensConfig(cache=str(kept / "tokens")),
        init=InitConfig(checkpoint=str(kept / "run"), head="keep"),
    )
    assert train(cfg, kept / "next", devices=one)["knn"] > 0
