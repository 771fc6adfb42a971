"""Before anything else: a limit to what an image file can make its decoder allocate.

OpenCV reads it when it is loaded. Its own is 2^30 pixels, 3 GB for a file of a few bytes. An image
that has more counts as one that cannot be decoded; set the variable yourself for larger ones.
"""

import os

MOST_PIXELS = 2**27
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(MOST_PIXELS))
