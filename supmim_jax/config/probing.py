"""A measurement of trained encoders."""

from dataclasses import dataclass

from supmim_jax.config.data import ProbeDataConfig
from supmim_jax.config.evaluation import EvalConfig
from supmim_jax.config.fields import ConfigError
from supmim_jax.config.training import MeshConfig


@dataclass(frozen=True)
class ProbeConfig:
    """What to measure trained encoders by. The encoder itself is that of its own run's config."""

    data: ProbeDataConfig = ProbeDataConfig()
    eval: EvalConfig = EvalConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        if self.eval.every:
            raise ConfigError(f"eval.every is {self.eval.every}; only training evaluates again.")
