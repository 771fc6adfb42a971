"""Keeps JAX out of the processes that decode images.

A spawned process first imports, under the name __mp_main__, the module that its parent ran as a
script: `supmim_jax.train`, and so all of JAX, Flax and Orbax. Here it imports this one, which bars
JAX, as Grain works without it: a worker is smaller and starts sooner (docs/data.md). TensorFlow is
not imported by anything that a worker needs.
"""

import importlib.util
import sys

NAME = "supmim_jax.data.worker"


def keep_light() -> None:
    """From now on, processes that this one spawns import this module in place of its script.

    Grain starts its workers whenever it needs them, so this holds until the end.
    """
    sys.modules["__main__"].__spec__ = importlib.util.find_spec(NAME)


if __name__ == "__mp_main__":
    sys.modules["jax"] = None  # importing it raises ImportError
