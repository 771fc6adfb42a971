"""Rehearsals: slices, links, the sweep; and one small step compiled for TPU, where libtpu is."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import REPOSITORY

from supmim_jax import sharding
from supmim_jax.config import MeshConfig
from supmim_jax.errors import SetupError
from supmim_jax.rehearse import __main__ as rehearse
from supmim_jax.rehearse import aot
from supmim_jax.rehearse.hlo import Collective

NO_SLICES = [
    *("v7:2x2", "v5e", "v5e:3x5", "v6e:4x4x4", "v4:8x8x4", "v4:4x4", "v4:4x6x8", "v4:16x16x20"),
    "v5p:0x4x4",
]


@pytest.mark.parametrize("name", NO_SLICES)
def test_a_slice_that_does_not_exist_is_refused(name):
    with pytest.raises(SetupError, match=f"--topology.*{name}"):
        aot.parse(name)


def test_slices(monkeypatch):
    part = aot.parse("v5p:4x8x8")
    assert (part.chips, part.wraps, part.name) == (256, (True,) * 3, "v5p:4x8x8")
    assert aot.parse("v4:2x2x4").wraps == (False,) * 3
    assert aot.parse("v5e:8x16").wraps == (False, True)
    # One link, one way: 400 GB/s both ways over 4; 6 links of 50 GB/s of a v4.
    assert aot.CHIPS["v5e"].link == 50e9 == aot.CHIPS["v4"].link
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    with pytest.raises(SetupError, match=r"pip install -e '\.\[tpu\]'"):
        aot.devices(part)


ROW, HALF, SQUARE = (np.arange(n)[None] for n in (16, 8, 256))
LINKS = {  # kind, groups, seconds: 1.6 MB over links of 50 GB/s are 32 us on one
    "ring": ("all-gather", ROW, 15 / 16 * 32e-6 / 2),
    "line": ("reduce-scatter", HALF, 7 / 8 * 32e-6),
    "torus": ("all-reduce", SQUARE, 2 * 255 / 256 * 32e-6 / 4),
    "neighbours": ("collective-permute", np.array([[0, 1], [1, 0]]), 32e-6 / 4),
    "around": ("collective-permute", np.array([[0, 15], [15, 0]]), 32e-6 / 4),
    "opposite": ("collective-permute", np.array([[0, 8], [8, 0]]), 8 * 32e-6 / 4),
    "exchange": ("all-to-all", ROW, 4 * 32e-6 / 4),
}


@pytest.mark.parametrize("case", LINKS)
def test_links(case):
    """Devices are counted along rows of 16x16."""
    kind, groups, expected = LINKS[case]
    at = np.array([(x, y, 0) for x in range(16) for y in range(16)])
    one = Collective(kind, 1_600_000, 1, groups, ("bf16",))
    assert rehearse.seconds(one, at, aot.parse("v5e:16x16")) == pytest.approx(expected)


def test_the_sweep_tries_what_can_run_and_recommends_the_smallest_of_the_fastest(cfg):
    model = dataclasses.replace(cfg.model, width=768, depth=12, mlp_dim=3072, heads=12)
    cfg = dataclasses.replace(cfg, model=model, batch_size=4096)
    found = rehearse.candidates(cfg, aot.parse("v5e:16x16"))
    shapes = {(c.mesh.data, c.mesh.fsdp, c.mesh.tensor) for c in found}
    assert (16, 16, 1) in shapes and (64, 1, 4) in shapes
    assert all(d * f * t == 256 and 768 % f == 0 and 12 % t == 0 for d, f, t in shapes)
    assert (found[0].mesh, found[0].model.remat) == (MeshConfig(16, 16, 1), "names")
    few = rehearse.candidates(dataclasses.replace(cfg, batch_size=256), aot.parse("v5e:8x8"))
    assert few and all(256 / (c.mesh.data * c.mesh.fsdp) % 8 == 0 for c in few)

    def result(seconds: float, gib: float, fits: bool = True, data: int = 1) -> dict:
        return {
            "fits": fits, "step_seconds": seconds, "ici_seconds": 0.0, "remat": "names",
            "mesh": {"data": data, "fsdp": 1, "tensor": 1}, "hbm_gib": {"total": gib},
        }  # fmt: skip

    tried = [result(1.0, 9, data=2), result(1.01, 3, data=4), result(1.1, 1, data=8)]
    told = rehearse.recommend([*tried, result(0.5, 1, fits=False)])
    assert "mesh.data=4" in told and "3.00 GiB" in told
    assert "mesh." not in rehearse.recommend([result(1.0, 20, fits=False)])


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("memory required for HLO temporaries (22.93G) exceeds available HBM (15.75G).",
         ("22.93", "15.75")),
        ("out of memory in memory space hbm. Used 31.5G of 15.75G hbm.", ("31.5", "15.75")),
    ],
)  # fmt: skip
def test_out_of_memory_is_read_from_the_compiler(text, numbers):
    assert aot.EXHAUSTED.search(f"RESOURCE_EXHAUSTED: {text}").groups() == numbers


def test_what_does_not_fit_is_reported(cfg, monkeypatch):
    def refuse(*_):
        raise aot.TooLarge(22.93, 15.75)

    monkeypatch.setattr(aot, "devices", lambda part: jax.devices())
    monkeypatch.setattr(aot, "compile_step", refuse)
    result = rehearse.rehearse(cfg, aot.parse("v5e:2x4"))
    assert not result["fits"] and (result["needed_gib"], result["available_gib"]) == (22.93, 15.75)
    for text in (rehearse.report(result), rehearse.table([result])):
        assert "22.93 GiB of 15.75" in text
    assert "model.remat='names'" in rehearse.report(result)


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)
def test_a_small_step_compiled_for_tpu(tmp_path):
    """The command on two small layers, FSDP over 2 of 4 chips; libtpu in a process of its own."""
    out = tmp_path / "result.json"
    changes = {
        "batch_size": 32, "mesh.fsdp": 2, "model.depth": 2, "model.width": 128,
        "model.mlp_dim": 256, "model.layer_scale": 1e-4, "model.dtype": "bfloat16",
        "model.remat": "names",
    }  # fmt: skip
    command = [sys.executable, "-m", "supmim_jax.rehearse", "--topology", "v5e:2x2", "--json", out]
    command += ["--config", "configs/debug_supervised.py"]
    command += [f"--config.{key}={value}" for key, value in changes.items()]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["fits"] and result["mesh"] == {"data": 2, "fsdp": 2, "tensor": 1}
    # One tenth of the encoder's FLOPs would be a repeated attention.
    assert result["flops_ratio_with_recomputed"] == pytest.approx(1.0, abs=2e-3)
    assert result["collectives"]["all-gather"]["of_parameters"] == pytest.approx(2.0, abs=0.3)
    assert 0.0 < result["mfu"] <= 1.0 and result["hbm_bytes"] > 0
    assert "step at least" in done.stdout


def test_a_dim_of_a_slice_may_be_split_between_axes(monkeypatch):
    """jax.make_mesh refuses fsdp=8 on 16x16 chips; the slice is then split."""

    def refuse(*args, **kwargs):
        raise NotImplementedError

    monkeypatch.setattr(jax, "make_mesh", refuse)
    mesh = sharding.make_mesh(MeshConfig(fsdp=2), jax.devices()[:4])
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 1}
    assert all(kind == jax.sharding.AxisType.Auto for kind in mesh.axis_types)
