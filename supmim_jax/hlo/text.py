"""The HLO text of a compiled program as data: computations, instructions and stack frames."""

import math
import re
from dataclasses import dataclass
from functools import cached_property


class UnknownCost(ValueError):
    """The program does work that the text doesn't tell the amount of."""


BITS = {"pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "bf16": 16, "token": 0, "opaque": 0}


@dataclass(frozen=True)
class Array:
    """dtype[dims] with its layout; `space` is 0 for main memory, on TPU 1 for VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        width = re.search(r"\d+", self.dtype)  # f32, u8, f8e4m3fn
        bits = BITS[self.dtype] if self.dtype in BITS else int(width[0])
        return math.prod(self.dims) * bits // 8


def arrays(shape: str) -> tuple[Array, ...]:
    """The arrays of a shape, those of a tuple in order."""
    found = re.findall(r"\b([a-z]\w*)\[([^\]]*)\](?:{([^}]*)})?", shape)
    result = []
    for dtype, dims, layout in found:
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        result.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return tuple(result)


@dataclass(frozen=True)
class Instruction:
    """%name = shape opcode(inside), attributes."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @cached_property
    def operands(self) -> tuple[str, ...]:
        return tuple(re.findall(r"%([^\s,(){}]+)", self.inside))

    @cached_property
    def arrays(self) -> tuple[Array, ...]:
        return arrays(self.shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes of the array, or of the first one in a tuple."""
        return self.arrays[0].dims

    def ints(self, key: str) -> tuple[int, ...]:
        """The value of key={1,2}; () where there is none."""
        found = re.search(rf"\b{key}={{([\d,]*)}}", self.attributes)
        return tuple(int(d) for d in found[1].split(",") if d) if found else ()

    def text(self, key: str, default: str = "") -> str:
        """The value of key=value or key="value" up to a space, comma or quote."""
        found = re.search(rf'\b{key}="?([^\s,"}}]+)', self.attributes)
        return found[1] if found else default

    @property
    def op_name(self) -> str:
        found = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, *keys: str) -> tuple[str, ...]:
        """Names of the computations in key=%a or key={%a, %b}; default: under any key."""
        key = "|".join(keys or CALLS)
        found = re.findall(rf"\b(?:{key})=(?:{{([^}}]*)}}|%([^\s,]+))", self.attributes)
        return tuple(n.strip(" %") for many, one in found for n in (many or one).split(",") if n)


CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
    "select",
    "scatter",
)


@dataclass(frozen=True)
class Computation:
    instructions: dict[str, Instruction]
    root: Instruction


@dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str
    frames: dict[int, tuple[str, ...]]  # of a stack_frame_id: Python functions, outermost first

    def functions(self, instruction: Instruction) -> tuple[str, ...]:
        """The Python functions that an instruction was traced in, outermost first."""
        return self.frames.get(int(instruction.text("stack_frame_id", "0")), ())


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
      ValueError: there is no ENTRY computation.
    """
    computations, entry, current = {}, None, None
    lines = text.splitlines()
    for line in lines:
        header = re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line)
        if header:
            name, current, root = header[2], {}, None
            entry = name if header[1] else entry
        elif current is not None and line.startswith("}"):
            computations[name] = Computation(current, root)
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
            root = instruction if line.lstrip().startswith("ROOT ") else root
    if entry is None:
        raise ValueError("The text is no HLO module: it has no ENTRY computation.")
    return Module(computations, entry, _frames(lines))


def _instruction(line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    cut = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].strip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    return Instruction(name.lstrip("%"), shape, rest[:start], rest[start + 1 : end - 1], rest[end:])


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one at 0."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"A parenthesis is never closed in the HLO line {text[:80]!r}.")


def _frames(lines: list[str]) -> dict[int, tuple[str, ...]]:
    """The tables FunctionNames, FileLocations and StackFrames, followed to the function names."""
    tables: dict[str, dict[int, str]] = {}
    rows = None
    for line in lines:
        if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            rows = tables[line] = {}
        elif rows is not None and re.match(r"\d+ ", line):
            number, row = line.split(" ", 1)
            rows[int(number)] = row
        else:
            rows = None

    def field(row: str, key: str) -> int:
        found = re.search(rf"{key}=(\d+)", row)
        return int(found[1]) if found else 0

    names = {n: row.strip('"') for n, row in tables.get("FunctionNames", {}).items()}
    places = {
        n: names[field(row, "function_name_id")]
        for n, row in tables.get("FileLocations", {}).items()
    }
    links = {
        n: (places[field(row, "file_location_id")], field(row, "parent_frame_id"))
        for n, row in tables.get("StackFrames", {}).items()
    }
    # Frame 1 has no parent. XLA prints parents one too high, so that it seems to be its own.
    shift = links[1][1] if 1 in links else 0
    chains: dict[int, tuple[str, ...]] = {0: ()}
    for n, (function, parent) in links.items():  # parents come before their children
        chains[n] = (*chains[parent - shift], function)
    # A call inside a scan repeats its callers' frames.
    return {n: tuple(dict.fromkeys(chain)) for n, chain in chains.items()}
