"""What the probes share; not a probe itself.

A probe is a function `get_config(arg="")` that returns `finish(ProbeConfig(...), arg)`. It says
what a trained encoder is measured by and on which data; the encoder, its image size and channels
are those of the checkpoint. Any value can be overridden: --config.eval.linear.held_out=0.1.
"""

from ml_collections import ConfigDict

from supmim_jax.config import KNNConfig, ProbeConfig
from supmim_jax.config.configdict import to_configdict
from supmim_jax.errors import ConfigError

KNN_SWEEP = KNNConfig(ks=(1, 5, 10, 20, 50, 100, 200))


def finish(config: ProbeConfig, arg: str) -> ConfigDict:
    """The locked ConfigDict of a probe that knows no argument."""
    if arg:
        raise ConfigError(f"The config argument {arg!r} is unknown; this probe takes none.")
    return to_configdict(config)
