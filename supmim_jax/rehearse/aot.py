"""TPU chips, the slices of them that exist, and the train step compiled for one by libtpu."""

import math
import os
import re
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from supmim_jax.config import Config
from supmim_jax.errors import SetupError
from supmim_jax.rehearse import hlo
from supmim_jax.train_step import TrainStep

FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
SMALL_CUBOIDS = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")  # below a cube of 4x4x4; then multiples of 4


class Chip(NamedTuple):
    """What one chip has, by its documentation."""

    flops: float  # bfloat16 per second
    hbm_gib: float
    hbm_bytes: float  # per second
    ici: float  # bytes per second, all links, both ways
    dimensions: int  # of its network
    largest: int  # chips of a slice

    @property
    def link(self) -> float:
        """Bytes per second of one connection to a neighbour, one way."""
        return self.ici / (2 * self.dimensions) / 2


# https://cloud.google.com/tpu/docs/v4 and so on. Where pages of different dates differ (v5e:
# 819 GB/s or 800 GiB/s of HBM; v6e: 1640 or 1600 GB/s, 3584 Gbit/s or 800 GB/s both ways of ICI),
# HBM is of the first and ICI of the second. v4's ICI is on no page: 6 links of 50 GB/s as quoted
# from arXiv 2304.01433, unchecked.
CHIPS = {
    "v4": Chip(275e12, 32, 1200e9, 600e9, 3, 4096),
    "v5e": Chip(197e12, 16, 819e9, 400e9, 2, 256),
    "v5p": Chip(459e12, 95, 2765e9, 1200e9, 3, 6144),
    "v6e": Chip(918e12, 32, 1640e9, 800e9, 2, 256),
}


class Slice(NamedTuple):
    """Chips of one kind in a rectangle or cuboid."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

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
    """The slice of a name such as v5e:16x16; raises SetupError if there is none."""
    name, _, text = topology.partition(":")
    if name in CHIPS and re.fullmatch(r"\d+(x\d+)+", text):
        chip, shape = CHIPS[name], tuple(int(n) for n in text.split("x"))
        cubes = len(shape) == 3 and all(n and n % 4 == 0 for n in shape)
        ascending = list(shape) == sorted(shape) and math.prod(shape) <= chip.largest
        cuboid = text in SMALL_CUBOIDS or (cubes and ascending)
        if cuboid if chip.dimensions == 3 else text in FLAT:
            return Slice(topology, chip, shape)
    raise SetupError(
        f"--topology is {topology!r}; it must be a chip and a slice of it, such as v5e:16x16. v5e "
        f"and v6e come as {', '.join(FLAT)}; v4 and v5p as {', '.join(SMALL_CUBOIDS)}, or three "
        f"multiples of 4 in ascending order with at most {CHIPS['v4'].largest} and "
        f"{CHIPS['v5p'].largest} chips."
    )


# libtpu asks a metadata server for the machine it is on, and locks the machine's chips.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
EXHAUSTED = re.compile(r"\(?([\d.]+)G\)? (?:exceeds|of) .*?([\d.]+)G", re.S)


class TooLarge(Exception):
    """The compiler found no way to fit the step into HBM; in GiB what it needs, and may have."""


class Compiled(NamedTuple):
    """A step for one chip: all counts are of that chip."""

    entry: hlo.Computation
    memory: dict[str, int]  # as `memory` gives it
    parameters: int  # how many are trained
    seconds: float  # that compiling took


def devices(part: Slice) -> list:
    """Devices to compile for, not to compute on; raises SetupError if libtpu has none."""
    if find_spec("libtpu") is None:
        raise SetupError("libtpu, which compiles for TPU, is missing: pip install -e '.[tpu]'")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    # A v4 has two cores; as a megacore they are one device.
    options = {"chip_config_name": "megacore"} if part.name.startswith("v4:") else {}
    try:
        found = topologies.get_topology_desc(part.name, "tpu", **options)
    except Exception as error:  # of several types, all with nothing but a message
        raise SetupError(f"--topology: libtpu knows no slice {part.name}: {error}") from None
    return list(found.devices)


def compile_step(cfg: Config, mesh: Mesh) -> Compiled:
    """Compiles the step that `train` would run.

    Raises:
      ConfigError: the mesh does not divide the batch or a parameter.
      TooLarge: it doesn't fit into HBM.
    """
    prog = TrainStep.build(cfg, mesh)
    lowered = prog.step.lower(prog.state, prog.batch, prog.frozen)
    start = time.perf_counter()
    # as_text() fails for v5p and v6e, so the compiler writes its program to a file.
    with tempfile.TemporaryDirectory() as directory:
        options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            found = EXHAUSTED.search(str(error))
            if "RESOURCE_EXHAUSTED" not in str(error) or not found:
                raise
            raise TooLarge(float(found[1]), float(found[2])) from None
        seconds = time.perf_counter() - start
        paths = Path(directory).glob("*jit_step*after_optimizations.txt")
        text = max(paths, key=lambda path: path.stat().st_size).read_text()
    parameters = sum(x.size for x in jax.tree.leaves(prog.state.params))
    return Compiled(hlo.parse(text), memory(compiled), parameters, seconds)


def memory(compiled) -> dict[str, int]:
    """Bytes of one device as the compiler lays them out; outputs don't replace arguments."""
    stats = compiled.memory_analysis()
    return {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes - stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
