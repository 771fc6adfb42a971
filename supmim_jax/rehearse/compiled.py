"""The train step, compiled by libtpu for a slice."""

import os
import re
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from supmim_jax import hlo, program
from supmim_jax.config import Config, SetupError
from supmim_jax.hlo.text import Module
from supmim_jax.rehearse.chips import Slice

# libtpu asks a metadata server for the machine it is on, and locks the machine's chips.
ALONE = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
EXHAUSTED = re.compile(r"\(?([\d.]+)G\)? (?:exceeds|of) .*?([\d.]+)G", re.S)


class TooLarge(Exception):
    """The compiler found no way to fit the step into HBM; in GiB what it needs, and may have."""

    def __init__(self, needed: float, available: float):
        super().__init__(f"needs {needed} GiB of {available} GiB")
        self.needed, self.available = needed, available


@dataclass(frozen=True)
class Memory:
    """Bytes of HBM of one chip, as the compiler lays them out."""

    arguments: int  # state, batch and frozen arrays
    outputs: int  # that don't take the place of arguments
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        return self.arguments + self.outputs + self.temporaries + self.code


@dataclass(frozen=True)
class Compiled:
    """A step for one chip: all counts are of that chip."""

    memory: Memory
    module: Module
    flops: int
    seconds: float  # that compiling took


def devices(part: Slice) -> list:
    """The slice's devices; they can be compiled for, not computed on.

    Raises:
      SetupError: libtpu is missing, or doesn't know the slice.
    """
    if find_spec("libtpu") is None:
        raise SetupError("libtpu, which compiles for TPU, is missing: pip install -e '.[tpu]'")
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    options = {"chip_config_name": "megacore"} if part.chip.name == "v4" else {}
    try:
        found = topologies.get_topology_desc(
            platform="tpu", topology_name=part.name, **options
        ).devices
    except Exception as error:  # of several types, all with nothing but a message
        raise SetupError(f"--topology: libtpu knows no slice {part.name}: {error}") from None
    if len(found) != part.chips:
        raise SetupError(
            f"--topology: libtpu gives {len(found)} devices for {part.name}, not {part.chips}."
        )
    return list(found)


def compile_step(cfg: Config, mesh: Mesh) -> Compiled:
    """Compiles the step that `train` would run.

    Raises:
      ConfigError: the mesh does not divide the batch or a parameter.
      TooLarge: it doesn't fit into HBM.
      hlo.UnknownCost: the program does what isn't known here.
    """
    prog = program.build(cfg, mesh)
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
    return read(text, compiled.memory_analysis(), seconds)


def read(text: str, stats, seconds: float) -> Compiled:
    """From the compiler's text and memory_analysis()."""
    memory = Memory(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
        temporaries=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    module = hlo.parse(text)
    return Compiled(memory, module, hlo.count_module(module).flops, seconds)
