"""TPU chips, and the slices of them that exist."""

import math
import re
from dataclasses import dataclass

from supmim_jax.config import SetupError

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_CUBOIDS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below a cube of 4x4x4; then multiples of 4


@dataclass(frozen=True)
class Chip:
    """What one chip has, by its documentation.

    `link` is of one connection to a neighbour, one way; the documents give all of a chip's links,
    both ways, as `ici`.
    """

    name: str
    cores: int  # TensorCores; they compile as one device
    flops: float  # bfloat16 per second
    hbm_gib: float
    hbm_bytes: float  # per second
    ici: float  # bytes per second, all links, both ways
    dimensions: int  # of its network
    largest: int  # chips of a slice
    source: str

    @property
    def link(self) -> float:
        return self.ici / (2 * self.dimensions) / 2


# Where pages of different dates differ (v5e: 819 GB/s or 800 GiB/s of HBM; v6e: 1640 or 1600 GB/s,
# 3584 Gbit/s or 800 GB/s both ways of ICI), HBM is of the first and ICI of the second.
CHIPS = {
    chip.name: chip
    for chip in (
        # ICI is not on its page: 6 links of 50 GB/s as quoted from arXiv 2304.01433, unchecked.
        Chip("v4", 2, 275e12, 32, 1200e9, 600e9, 3, 4096, "https://cloud.google.com/tpu/docs/v4"),
        Chip("v5e", 1, 197e12, 16, 819e9, 400e9, 2, 256, "https://cloud.google.com/tpu/docs/v5e"),
        Chip(
            "v5p", 2, 459e12, 95, 2765e9, 1200e9, 3, 6144, "https://cloud.google.com/tpu/docs/v5p"
        ),
        Chip("v6e", 1, 918e12, 32, 1640e9, 800e9, 2, 256, "https://cloud.google.com/tpu/docs/v6e"),
    )
}


@dataclass(frozen=True)
class Slice:
    """Chips of one kind in a rectangle or cuboid."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def wraps(self) -> tuple[bool, ...]:
        """Of each dimension, whether its ends are connected.

        Flat slices do so along 16 chips, cuboids when they are made of whole cubes of 4x4x4.
        """
        if self.chip.dimensions == 2:
            return tuple(size == 16 for size in self.shape)
        return (all(size % 4 == 0 for size in self.shape),) * 3


def parse(topology: str) -> Slice:
    """The slice of a name such as v5e:16x16.

    Raises:
      SetupError: there is no such chip or shape.
    """
    found = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", topology)
    if not found or found[1] not in CHIPS:
        raise SetupError(
            f"--topology is {topology!r}; it must be a chip and its shape, such as v5e:16x16 or "
            f"v4:4x8x8. Known chips are {', '.join(CHIPS)}."
        )
    chip, shape = CHIPS[found[1]], tuple(int(n) for n in found[2].split("x"))
    if chip.dimensions == 2 and found[2] not in FLAT:
        raise SetupError(f"--topology: {chip.name} slices are {', '.join(FLAT)}, not {found[2]}.")
    if chip.dimensions == 3 and found[2] not in SMALL_CUBOIDS:
        cubes = len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
        if not cubes or list(shape) != sorted(shape) or math.prod(shape) > chip.largest:
            raise SetupError(
                f"--topology: {chip.name} slices are {', '.join(SMALL_CUBOIDS)}, or three "
                f"multiples of 4 in ascending order with at most {chip.largest} chips, not "
                f"{found[2]}."
            )
    return Slice(chip, shape)
