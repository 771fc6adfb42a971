"""A sixth objective and another evaluation are added in the places that ARCHITECTURE.md names.

The objective: its own file, a line of OBJECTIVES, its section in config/objective.py with the union
in config/experiment.py, and a config file. The evaluation: evals/evaluate.py, config/experiment.py.
Nothing else is touched here, and commands, checkpoints and reports know them.
"""

import re
import typing
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax.numpy as jnp
import pytest
from conftest import ONE, QUICK
from flax import nnx

from supmim_jax import cli, probe
from supmim_jax.checkpoint import Checkpoint
from supmim_jax.config import Config, EvalConfig, changed, within
from supmim_jax.config.configdict import from_configdict
from supmim_jax.config.objective import Objective
from supmim_jax.evals import evaluate
from supmim_jax.models.vit import ViT, pixels
from supmim_jax.objectives import OBJECTIVES, losses
from supmim_jax.report.__main__ import write
from supmim_jax.train import train


@dataclass(frozen=True)
class BrightnessConfig(Objective):
    """Predicts an image's mean value: nonsense, but a whole objective."""

    leaves: ClassVar[str] = "encoder"
    terms: ClassVar[tuple[str, ...]] = ("loss", "error")

    name: Literal["brightness"] = "brightness"
    weight: float = within(1.0, 0.0, 10.0)


class Brightness(nnx.Module):
    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg.objective
        self.encoder = ViT(cfg.model, cfg.data, rngs=rngs)

    def loss(self, batch, key):
        images = pixels(batch.views[0])
        (tokens,) = self.encoder.encode((self.encoder.embed(images),), batch.row_key(key))
        guess = self.encoder.pool(tokens).mean(-1)
        error = losses.mean(jnp.abs(guess - images.mean((1, 2, 3))), batch.weight)
        return self.cfg.weight * error, {"loss": self.cfg.weight * error, "error": error}


CONFIG_FILE = """
from test_extending import BrightnessConfig
from configs import debug_supervised
from supmim_jax.config import Config, changed


def experiment() -> Config:
    return changed(debug_supervised.experiment(), objective=BrightnessConfig(weight=2))
"""


@pytest.fixture
def extended(monkeypatch):
    """The package with both additions."""
    union = typing.get_type_hints(Config)["objective"] | BrightnessConfig
    monkeypatch.setitem(Config.__annotations__, "objective", union)
    monkeypatch.setitem(OBJECTIVES, "brightness", Brightness)

    names = typing.get_args(typing.get_type_hints(EvalConfig)["which"])[0]
    which = tuple[Literal[(*typing.get_args(names), "norm")], ...]
    monkeypatch.setitem(EvalConfig.__annotations__, "which", which)
    metrics = EvalConfig.metrics.fget
    monkeypatch.setattr(
        EvalConfig,
        "metrics",
        property(lambda cfg: (*metrics(changed(cfg, which=("knn",))), "norm")),
    )

    def norm(subject: evaluate.Subject) -> evaluate.Results:
        return evaluate.Results({"norm": float((subject.test.pooled**2).mean())}, {})

    monkeypatch.setitem(evaluate.EVALUATIONS, "norm", norm)


def test_a_sixth_objective_and_another_evaluation(
    extended, data_dir, tmp_path, capsys, jax_devices=ONE
):
    (tmp_path / "brightness.py").write_text(CONFIG_FILE)
    cfg = from_configdict(cli.load(str(tmp_path / "brightness.py")))
    assert cfg.objective == BrightnessConfig(weight=2.0)
    cfg = changed(
        cfg,
        batch_size=16,
        epochs=1,
        data={"data_dir": data_dir, "train_split": "train[:64]", "train_examples": 64},
        model={"width": 16, "depth": 1, "mlp_dim": 32},
        eval={"which": ("knn", "norm"), "batch_size": 64, "every": 2, "segmentation": QUICK},
        checkpoint={"every": 2, "keep_best": "norm"},
    )
    results = train(cfg, tmp_path / "run", devices=jax_devices)
    assert re.search(r"\| loss \d\S* error \d\S* \|", capsys.readouterr().err)  # its own terms
    assert results["objective"] == "brightness" and {"knn", "norm"} <= set(results)
    best = Checkpoint.open(f"{tmp_path / 'run'}@best")
    assert best.config == cfg
    measured = probe.probe(best, devices=ONE).results.metrics
    assert set(measured) == {"knn", "norm"}
    assert "brightness" in write(str(tmp_path / "run")).read_text()
