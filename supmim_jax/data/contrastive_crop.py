"""Where a crop lies whose centre is drawn in a box (ContrastiveCrop, arXiv 2202.03278, section 3).

Semantic-aware localisation: the box is around what the image shows, so that crops hold some of it.
Centre-suppressed sampling: with alpha < 1 the density of Beta(alpha, alpha) is U-shaped, so that
two crops of one image seldom lie on each other.

A table of boxes is uint8 Nx4: top, left, bottom and right of each record's box, in 255ths of its
image's height or width; (0, 0, 255, 255) is the whole image.
"""

from collections.abc import Sequence

import numpy as np

UNITS = 255  # of an image's height or width
WHOLE = (0, 0, UNITS, UNITS)
CENTRE = (64, 64, 191, 191)  # half the height and width, as near as 255ths come (SimCCrop)


def offsets(
    image: tuple[int, int],
    crop: tuple[int, int],
    bounds: Sequence[int],
    alpha: float,
    rng: np.random.Generator,
) -> tuple[int, int]:
    """Top and left, in pixels, of a crop whose centre is drawn in a box.

    As in the published code (github.com/xyupeng/ContrastiveCrop, its later version): the range of
    each coordinate is first cut to where the crop is inside the image, Beta is over what is left,
    and pixels are rounded down. A box without extent gives a crop around it, and opposite edges may
    come in either order.

    Args:
      image: height and width.
      crop: height and width, at most the image's.
      bounds: a row of a table of boxes.
      alpha: of the Beta distribution; 1 is uniform.
      rng: gives two numbers.
    """
    edges = tuple(int(edge) for edge in bounds)  # uint8 would overflow
    found = []
    for axis in (0, 1):
        room = image[axis] - crop[axis]
        first, last = (
            min(max(image[axis] * edge // UNITS - crop[axis] // 2, 0), room)
            for edge in edges[axis::2]
        )
        found.append(first + int((last - first) * rng.beta(alpha, alpha)))
    return found[0], found[1]
