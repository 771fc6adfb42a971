"""Supervised representation learning with masked image modelling, in JAX.

`supmim_jax.load(location)` is the encoder of a checkpoint, for use in Python: see inference.py.
Nothing heavy is imported before it is asked for.

Other libraries read these settings from the environment as they are loaded. OpenCV: how many pixels
an image may have. Its own limit is 2^30, 3 GB for a file of a few bytes. An image that has more
counts as one that cannot be decoded; set the variable yourself for larger ones. epath: gs:// is
read by gcsfs, where it would load TensorFlow. gcsfs: directories are listed anew each time, as
other processes write to them.
"""

import os
import sys
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

__all__ = ["Encoder", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from supmim_jax import inference

    return getattr(inference, name)
