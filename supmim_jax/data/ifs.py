"""Iterated function systems: random figures, one per class, and the chaos game that draws them.

A system is 2 to MAX_MAPS contractive maps (a b c d e f): x' = a x + b y + e, y' = c x + d y + f.
Arithmetic is + - * / in float64, element by element, so a figure does not depend on its batch.
M stands for MAX_MAPS, T for the steps of the chaos game, C for its chains.
"""

import functools

import numpy as np
from numpy.typing import NDArray

MAX_MAPS = 4
MAX_STRETCH = (
    0.8  # of a map; with entries off by 15 % it still contracts: 0.8 (1 + 0.15 sqrt 2) < 1
)
CHAINS, BURN_IN = 64, 8  # of the chaos game: chains side by side, first steps thrown away
RASTER = 32  # pixels: the figures of the classes are judged and compared at this size
FILL = (0.12, 0.45)  # the share of the raster that a figure may cover
MAX_OVERLAP = 0.6  # intersection over union of the rasters, between any two classes
CANDIDATES, ATTEMPTS = 16, 1000  # systems tried at once, and how often, before a class is given up

Array = NDArray[np.float64]


def generator(seed: int, stream: int, label: int, instance: int) -> np.random.Generator:
    """A generator of its own for every class and image: its 128-bit key is their address."""
    key = seed << 64 | stream << 56 | label << 32 | instance
    return np.random.Generator(np.random.Philox(key=key))


def turn(half_tangent: Array) -> tuple[Array, Array]:
    """Cosine and sine of 2 atan(half_tangent). Being rational, the same bits on any machine."""
    square = half_tangent * half_tangent
    return (1 - square) / (1 + square), 2 * half_tangent / (1 + square)


def chaos_game(maps_BxMx6: Array, choices_BxN: NDArray[np.integer]) -> tuple[Array, Array]:
    """Points on B attractors: x and y, TxBxC each, where N = (T + BURN_IN) * C.

    The choices say which map moves a point; all chains start at the fixed point of map 0, which
    is on the attractor.
    """
    batch = len(maps_BxMx6)
    index_TxBxC = choices_BxN.reshape(batch, -1, CHAINS).transpose(1, 0, 2).astype(np.intp)
    index_TxBxC += MAX_MAPS * np.arange(batch)[:, None]
    table = np.ascontiguousarray(maps_BxMx6.reshape(-1, 6).T)
    a, b, c, d, e, f = maps_BxMx6[:, 0].T[..., None]
    determinant = (1 - a) * (1 - d) - b * c
    x, y = (e * (1 - d) + b * f) / determinant, (f * (1 - a) + c * e) / determinant
    xs, ys = np.empty((2, *index_TxBxC.shape))
    for step, index_BxC in enumerate(index_TxBxC):
        a, b, c, d, e, f = table.take(index_BxC, axis=1)
        x, y = a * x + b * y + e, c * x + d * y + f
        xs[step], ys[step] = x, y
    return xs[BURN_IN:], ys[BURN_IN:]


def rasterise(xs: Array, ys: Array, size: int, scale_B: Array, shift_2xB: Array) -> NDArray:
    """Points per pixel, int64 BxHxW, of points TxBxC.

    The longer side of the figure becomes scale * size pixels long; a shift of -1 or 1 (x, y) moves
    it to the edge of the image, 0 keeps it in the middle.
    """
    low = np.stack([xs.min((0, 2)), ys.min((0, 2))])
    high = np.stack([xs.max((0, 2)), ys.max((0, 2))])
    pixels_B = scale_B * size / (high - low).max(0)
    offset_2xB = (size + shift_2xB * (1 - scale_B) * size - (low + high) * pixels_B) / 2
    column, row = (
        np.clip((points * pixels_B[:, None] + offset_B[:, None]).astype(np.intp), 0, size - 1)
        for points, offset_B in zip((xs, ys), offset_2xB)
    )
    batch = len(scale_B)
    flat = (np.arange(batch)[:, None] * size + row) * size + column
    return np.bincount(flat.ravel(), minlength=batch * size**2).reshape(batch, size, size)


def _candidates(random: np.random.Generator) -> tuple[Array, NDArray[np.uint8], NDArray[np.bool_]]:
    """Random systems: maps BxMx6, the map that each byte stands for Bx256, which of them contract.

    Drawn as rotation, signed singular values s1 >= s2, rotation. Good-looking systems of n maps
    have a sum of s1 + 2 s2 between (5 + n) / 2 and (6 + n) / 2 (Anderson & Farrell, WACV 2022).
    A map is chosen with a probability proportional to |s1 s2|, and at least about 2 %.
    """
    count = int(random.integers(2, MAX_MAPS + 1))
    singular = np.sort(random.random((2, CANDIDATES, count)), axis=0)[::-1]
    wanted = (5 + count + random.random(CANDIDATES)) / 2
    singular = singular * (wanted / (singular[0] + 2 * singular[1]).sum(-1))[:, None]
    s1, s2 = singular * random.choice((-1.0, 1.0), singular.shape)
    cos1, sin1 = turn(random.uniform(-1, 1, s1.shape))
    cos2, sin2 = turn(random.uniform(-1, 1, s1.shape))
    a, b = cos1 * s1 * cos2 - sin1 * s2 * sin2, -cos1 * s1 * sin2 - sin1 * s2 * cos2
    c, d = sin1 * s1 * cos2 + cos1 * s2 * sin2, -sin1 * s1 * sin2 + cos1 * s2 * cos2
    e, f = random.uniform(-1, 1, singular.shape)
    maps_BxMx6 = np.zeros((CANDIDATES, MAX_MAPS, 6))
    maps_BxMx6[:, :count] = np.stack([a, b, c, d, e, f], axis=-1)
    area = np.abs(s1 * s2)
    limits = np.cumsum(area + 0.02 * area.sum(-1, keepdims=True), axis=-1)
    limits_Bx1xM = (limits / limits[:, -1:])[:, None, :]
    lookup_Bx256 = ((np.arange(256)[:, None] + 0.5) / 256 > limits_Bx1xM).sum(-1).astype(np.uint8)
    return maps_BxMx6, lookup_Bx256, singular[0].max(-1) < MAX_STRETCH


def _silhouettes(random: np.random.Generator, maps_BxMx6: Array, lookup_Bx256: NDArray) -> NDArray:
    """The pixels that the upright figures cover at RASTER x RASTER, packed: uint64 BxK."""
    draws_BxN = random.integers(0, 256, (len(maps_BxMx6), RASTER**2 + BURN_IN * CHAINS))
    xs, ys = chaos_game(maps_BxMx6, np.take_along_axis(lookup_Bx256, draws_BxN, axis=1))
    full_B, centred_2xB = np.ones(len(maps_BxMx6)), np.zeros((2, len(maps_BxMx6)))
    covered = rasterise(xs, ys, RASTER, full_B, centred_2xB) > 0
    return np.packbits(covered.reshape(len(covered), -1), axis=-1).view(np.uint64)


@functools.lru_cache(maxsize=8)
def class_systems(num_classes: int, seed: int) -> tuple[Array, NDArray[np.uint8]]:
    """The systems of all classes: maps NxMx6, and the map that each byte stands for, Nx256.

    Figures that cover too little or too much, or that resemble an earlier class, are drawn again.
    Class i depends on the classes before it only, not on their number. Raises ValueError if no
    further figure is found.
    """
    maps_NxMx6 = np.empty((num_classes, MAX_MAPS, 6))
    lookup_Nx256 = np.empty((num_classes, 256), np.uint8)
    accepted = np.zeros((num_classes, RASTER**2 // 64), np.uint64)
    for label in range(num_classes):
        for attempt in range(ATTEMPTS):
            random = generator(seed, 0, label, attempt)
            maps_BxMx6, lookup_Bx256, good = _candidates(random)
            figures = _silhouettes(random, maps_BxMx6, lookup_Bx256)
            covered = np.bitwise_count(figures).sum(-1) / RASTER**2
            good &= (FILL[0] < covered) & (covered < FILL[1])
            common = np.bitwise_count(figures[:, None] & accepted).sum(-1)
            union = np.bitwise_count(figures[:, None] | accepted).sum(-1)
            good &= (common / union).max(-1) < MAX_OVERLAP
            if good.any():
                first = good.argmax()
                maps_NxMx6[label], lookup_Nx256[label] = maps_BxMx6[first], lookup_Bx256[first]
                accepted[label] = figures[first]
                break
        else:
            raise ValueError(f"Seed {seed}: no figure found that differs from the {label} before.")
    return maps_NxMx6, lookup_Nx256
