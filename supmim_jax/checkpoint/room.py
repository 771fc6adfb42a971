"""Whether a checkpoint fits onto the disk, asked before it is begun."""

import math
from typing import Any

import jax
import numpy as np
from etils import epath

from supmim_jax import storage
from supmim_jax.config import SetupError

# Beside the arrays: orbax's indices and metadata (1 kB an array), the sums, blocks half filled.
MARGIN_SHARE, MARGIN = 0.02, 1 << 20


def needed(arrays: Any) -> int:
    """Bytes on disk of a tree of arrays, or of their shapes, as all hosts together write it.

    orbax compresses, by a few per cent for trained weights: this much is not relied on.
    """
    leaves = jax.tree.leaves(arrays)
    size = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in map(_array, leaves))
    return size + int(MARGIN_SHARE * size) + MARGIN


def check(directory: epath.Path, arrays: Any, intact: list[int]) -> None:
    """Raises SetupError if the file system of `directory` has no room for these arrays.

    All hosts write into the one directory, so one process asks, for all of them. What a quota
    leaves is not known, nor of gs:// anything.

    Args:
      directory: of the run's checkpoints.
      arrays: what is to be saved, or its shapes.
      intact: steps that are saved.
    """
    if jax.process_index() != 0:
        return
    free, wanted = storage.free_bytes(directory), needed(arrays)
    if free is not None and free < wanted:
        raise SetupError(
            f"{directory} has no room for a checkpoint: {_shown(free)} are free, and it takes "
            f"{_shown(wanted)}. {state(intact)} Free some room, or move --workdir to a larger "
            f"disk; the same command then goes on."
        )


def state(intact: list[int]) -> str:
    """What is left when a checkpoint cannot be saved."""
    if not intact:
        return "There is none before it."
    return f"The one before it, step {intact[-1]}, is intact."


def _shown(size: int) -> str:
    return f"{size} bytes ({size / 2**30:.2f} GiB)"


def _array(x: Any) -> Any:
    return x if hasattr(x, "dtype") else np.asarray(x)
