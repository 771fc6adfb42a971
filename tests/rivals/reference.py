"""What `data.transforms.resize` claims to compute, in float64 and with nothing of OpenCV."""

import numpy as np

CUBIC = -0.75  # OpenCV's; other libraries have -0.5


def resized(image: np.ndarray, height: int, width: int, how: str = "area") -> np.ndarray:
    """As `resize` with `how`, float64 HxWxC; sides that shrink to less than half are "area".

    Nothing is rounded or clipped: where bicubic overshoots, values lie outside [0, 255].
    """
    image = image.astype(np.float64)
    if how == "linear" and image.shape[0] <= 2 * height and image.shape[1] <= 2 * width:
        rows = linear_weights(image.shape[0], height)
        return _both_sides(image, rows, linear_weights, width)
    smaller = min(height, image.shape[0]), min(width, image.shape[1])
    image = _both_sides(image, area_weights(image.shape[0], smaller[0]), area_weights, smaller[1])
    return _both_sides(image, cubic_weights(smaller[0], height), cubic_weights, width)


def _both_sides(image: np.ndarray, rows: np.ndarray, weights, width: int) -> np.ndarray:
    columns = weights(image.shape[1], width)
    return np.einsum("hy,yxc,wx->hwc", rows, image, columns, optimize=True)


def area_weights(before: int, after: int) -> np.ndarray:
    """Matrix after x before: the share of each new pixel that each old one covers."""
    edges = np.arange(after + 1) * (before / after)
    low, high = edges[:-1, None], edges[1:, None]
    old = np.arange(before)
    covered = np.clip(np.minimum(high, old + 1) - np.maximum(low, old), 0, None)
    return covered * (after / before)


def linear_weights(before: int, after: int) -> np.ndarray:
    """Matrix after x before: the two nearest at centre-aligned places, the border repeated."""
    weights = np.zeros((after, before))
    for new in range(after):
        place = (new + 0.5) * before / after - 0.5
        low = int(np.floor(place))
        for tap in (low, low + 1):
            weights[new, np.clip(tap, 0, before - 1)] += 1 - abs(place - tap)
    return weights


def cubic_weights(before: int, after: int) -> np.ndarray:
    """Matrix after x before: Keys' kernel at centre-aligned places, the border repeated."""
    weights = np.zeros((after, before))
    for new in range(after):
        place = (new + 0.5) * before / after - 0.5
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[new, np.clip(tap, 0, before - 1)] += _keys(abs(place - tap))
    return weights


def _keys(distance: float) -> float:
    if distance < 1:
        return (CUBIC + 2) * distance**3 - (CUBIC + 3) * distance**2 + 1
    return CUBIC * (distance**3 - 5 * distance**2 + 8 * distance - 4) if distance < 2 else 0.0


def psnr(image: np.ndarray, expected: np.ndarray) -> float:
    """Decibels against a peak of 255; infinite where they are equal.

    `expected` is clipped to [0, 255] first, as an image of uint8 must be.
    """
    error = np.mean((image.astype(np.float64) - np.clip(expected, 0, 255)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")
