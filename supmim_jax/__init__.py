"""Supervised representation learning with masked image modelling, in JAX.

`supmim_jax.load(location)` is the encoder of a checkpoint, for use in Python: see inference.py.
Nothing heavy is imported before it is asked for.

Other libraries read these settings from the environment as they are loaded. OpenCV: how many pixels
an image may have. Its own limit is 2^30, 3 GB for a file of a few bytes. An image that has more
counts as one that cannot be decoded; set the variable yourself for larger ones. epath: gs:// is
read by gcsfs, where it would load TensorFlow. gcsfs: directories are listed anew each time, as
other processes write to them.
"""

import ctypes
import os
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from supmim_jax.inference import Encoder, load

_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
_given = os.environ.setdefault(_VARIABLE, str(2**27))
if not _given.isdecimal():  # OpenCV would end the process without a word of it
    print(f"error: {_VARIABLE} is {_given!r}, expected a number of pixels.", file=sys.stderr)
    raise SystemExit(2)
MOST_PIXELS = int(_given)
os.environ.setdefault("EPATH_USE_TF", "false")
os.environ.setdefault("FSSPEC_GCS", '{"use_listings_cache": false}')

# A step on a CPU asks for the same memory each time. In between, glibc would return it to Linux,
# and every page of it would be a fault: a third of a small model's step (docs/speed.md). A command
# that has nothing but CPUs therefore keeps what it frees, in one heap for all threads. Threads that
# are there already would have heaps of their own, which return large blocks: hence so early.
_asked, _plugins = os.environ.get("JAX_PLATFORMS"), ("jax_plugins", "libtpu")
_only_cpus = _asked == "cpu" or not (_asked or any(map(find_spec, _plugins)))
_mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc alone has it
if sys.argv[:1] == ["-m"] and _only_cpus and _mallopt:  # python -m supmim_jax.<command>
    _mallopt(-8, 1)  # M_ARENA_MAX: heaps
    _mallopt(-4, 0)  # M_MMAP_MAX: blocks outside of it
    _mallopt(-1, -1)  # M_TRIM_THRESHOLD: bytes of it that may lie idle; no limit

__all__ = ["Encoder", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supmim_jax import inference

    return getattr(inference, name)
