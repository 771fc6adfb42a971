"""Before anything else: a limit to what an image file can make its decoder allocate.

OpenCV reads it when it is loaded. Its own is 2^30 pixels, 3 GB for a file of a few bytes. An image
that has more counts as one that cannot be decoded; set the variable yourself for larger ones.
"""

import os
import sys

_VARIABLE = "OPENCV_IO_MAX_IMAGE_PIXELS"
_given = os.environ.setdefault(_VARIABLE, str(2**27))
if not _given.isdecimal():  # OpenCV would end the process without a word of it
    print(f"error: {_VARIABLE} is {_given!r}, expected a number of pixels.", file=sys.stderr)
    raise SystemExit(2)
MOST_PIXELS = int(_given)
