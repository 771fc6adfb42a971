"""The HLO text of a compiled program as data, and what it costs: FLOPs, collectives, HBM traffic.

`cost_analysis()` counts the body of a loop once, however often it runs. This module walks the
program from its entry and multiplies. The text of a partitioned program is that of one device.

FLOPs are those of matmuls and convolutions; a multiply-add counts 2. In a convolution only
multiply-adds with an element of the input count, not those with padding or with the holes of a
dilated input. So a strided convolution and its gradients cost the same, and so do matmuls that TPU
programs write as convolutions.

Collectives: TPU runs most of them asynchronously, and may spread one all-gather over a chain of
fusions that compute meanwhile. Each of them repeats the all-gather with the same channel_id, so it
counts once, even if the chain continues in loops inside the loop where it began. Outside of fusions
several instructions may share a channel_id, and each counts. TPU also writes a reduce-scatter as a
fusion `all-reduce-scatter` of an all-reduce and a slice. All of these share one channel_id, and
each counts as a reduce-scatter.

Traffic is what the operands and results of each scheduled instruction move, once each. Instructions
inside a fusion move nothing, because they stay on the chip. An operand of which only slices are
used counts as those slices, and a result that updates an operand in place counts as the update.
Arrays in another memory space (VMEM on TPU) cost nothing, but the copies into it do.
"""

import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

# --- the program


class UnknownCost(ValueError):
    """The program does work that the text doesn't tell the amount of."""


BITS = {"pred": "8", "token": "0", "opaque": "0"}  # of others the name says: f32, u8, f8e4m3fn


class Array(NamedTuple):
    """An array with its layout; `space` is 0 for main memory, on TPU 1 for VMEM."""

    dtype: str
    dims: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = BITS.get(self.dtype) or re.search(r"\d+", self.dtype)[0]
        return math.prod(self.dims) * int(bits) // 8


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, those of a tuple in order."""
    result = []
    for dtype, dims, layout in re.findall(r"\b([a-z]\w*)\[([^\]]*)\](?:{([^}]*)})?", shape):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        result.append(Array(dtype, sizes, int(space[1]) if space else 0))
    return result


CALLS = (
    "calls|to_apply|body|condition|branch_computations|true_computation|false_computation|"
    "called_computations|select|scatter"
)


@dataclass(eq=False, repr=False)
class Instruction:
    """%name = shape opcode(inside), attributes."""

    computation: "Computation"
    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @cached_property
    def operands(self) -> list["Instruction"]:
        names = re.findall(r"%([^\s,(){}]+)", self.inside)
        return [self.computation.instructions[name] for name in names]

    @cached_property
    def arrays(self) -> list[Array]:
        return arrays(self.shape)

    @property
    def dims(self) -> tuple[int, ...]:
        """Sizes of the array, or of the first one in a tuple."""
        return self.arrays[0].dims

    def text(self, key: str, default: str = "") -> str:
        """The value of key=value or key="value" up to a space, comma or quote."""
        found = re.search(rf'\b{key}="?([^\s,"}}]+)', self.attributes)
        return found[1] if found else default

    @property
    def op_name(self) -> str:
        found = re.search(r'\bop_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    def called(self, keys: str = CALLS) -> list["Computation"]:
        """The computations in key=%a or key={%a, %b}; `keys` is a regular expression."""
        found = re.findall(rf"\b(?:{keys})=(?:{{([^}}]*)}}|%([^\s,]+))", self.attributes)
        names = [n.strip(" %") for many, one in found for n in (many or one).split(",") if n]
        return [self.computation.module[name] for name in names]


@dataclass(eq=False, repr=False)
class Computation:
    module: dict[str, "Computation"]
    name: str
    instructions: dict[str, Instruction]
    root: Instruction | None = None

    @cached_property
    def flops(self) -> int:
        """FLOPs of one execution; of a conditional the most expensive branch counts.

        Raises:
          UnknownCost: a loop with matmuls whose trip count can't be found, or a call that looks
            like a matmul and isn't known here.
        """
        return sum(map(flops, self.instructions.values()))


def parse(text: str) -> Computation:
    """The entry of what `compiled.as_text()` gives; its `module` has all computations.

    Raises:
      ValueError: there is no ENTRY computation.
    """
    module, entry, current = {}, None, None
    for line in text.splitlines():
        if header := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line):
            current = module[header[2]] = Computation(module, header[2], {})
            entry = current if header[1] else entry
        # Not "}}, metadata=...", which ends an attribute of several lines.
        elif re.match(r"\}(,|$)", line):
            current = None
        elif current is not None and " = " in line:
            instruction = _instruction(current, line)
            current.instructions[instruction.name] = instruction
            if line.lstrip().startswith("ROOT "):
                current.root = instruction
    if entry is None:
        raise ValueError("The text is no HLO module: it has no ENTRY computation.")
    return entry


def _instruction(computation: Computation, line: str) -> Instruction:
    name, rest = line.strip().removeprefix("ROOT ").split(" = ", 1)
    cut = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:cut], rest[cut:].strip()
    start = rest.index("(")
    end = start + _closing(rest[start:])
    inside, attributes = rest[start + 1 : end - 1], rest[end:]
    return Instruction(computation, name.lstrip("%"), shape, rest[:start], inside, attributes)


def _closing(text: str) -> int:
    """The place after the parenthesis that closes the one at 0."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return found.end()
    raise ValueError(f"A parenthesis is never closed in the HLO line {text[:80]!r}.")


# --- loops


class Run(NamedTuple):
    instruction: Instruction
    loops: tuple[str, ...]  # names of those around it, outermost first
    times: int | None  # None: in a loop whose trip count can't be told


def runs(computation: Computation, loops: tuple = (), times: int | None = 1) -> Iterator[Run]:
    """Its instructions, those of bodies of loops and of called computations.

    Not those inside fusions, nor of conditions of loops. Of a conditional all branches are given.
    """
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(instruction)
            inner = None if None in (trips, times) else times * trips
            yield from runs(*instruction.called("body"), (*loops, instruction.name), inner)
        elif instruction.opcode in ("call", "conditional"):
            for called in instruction.called():
                yield from runs(called, loops, times)
        else:
            yield Run(instruction, loops, times)


MOST_TRIPS = 100_000  # that are tried out


def trip_count(loop: Instruction) -> int | None:
    """Executions of the body of a `while`, None if they can't be told.

    CPU and GPU note them in the backend's config. TPU doesn't: there the loop's scalars are
    computed until its condition ends it.
    """
    if known := re.search(r'"known_trip_count":\s*{\s*"n":\s*"(\d+)"', loop.attributes):
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    state = evaluate(loop.operands[0], ())
    for trips in range(MOST_TRIPS):
        goes_on = evaluate(condition.root, (state,))
        if not goes_on:
            return None if goes_on is None else trips
        before, state = state, evaluate(body.root, (state,))
        if state == before:
            return None
    return None


OPERATORS = {"add": operator.add, "subtract": operator.sub}
SAME_VALUE = ("copy", "convert", "bitcast", "reshape")


def evaluate(
    instruction: Instruction, arguments: tuple, done: dict[str, Any] | None = None
) -> int | list | None:
    """An integer, or a list for a tuple, given those of the computation's parameters.

    None stands for what isn't known: arrays, and what neither counts nor compares. `done` has what
    is computed already: a value may be asked for in very many ways.
    """
    done = {} if done is None else done
    if instruction.name not in done:
        done[instruction.name] = _evaluated(instruction, arguments, done)
    return done[instruction.name]


def _evaluated(instruction: Instruction, arguments: tuple, done: dict) -> int | list | None:
    opcode = instruction.opcode
    if opcode == "parameter":
        number = int(instruction.inside)
        return arguments[number] if number < len(arguments) else None
    if not re.match(r"\(|(?:pred|[su]\d+)\[\]", instruction.shape):
        return None
    if opcode == "constant":
        return int({"true": "1", "false": "0"}.get(instruction.inside, instruction.inside))
    known = ("tuple", "fusion", "call", "get-tuple-element", "compare", *OPERATORS, *SAME_VALUE)
    if opcode not in known:
        return None
    values = [evaluate(operand, arguments, done) for operand in instruction.operands]
    if opcode == "tuple":
        return values
    if opcode in ("fusion", "call"):
        return evaluate(instruction.called("calls|to_apply")[0].root, tuple(values))
    if None in values:
        return None
    if opcode == "get-tuple-element":
        return values[0][int(instruction.text("index"))]
    if opcode == "compare":
        return int(getattr(operator, instruction.text("direction").lower())(*values))
    return OPERATORS[opcode](*values) if opcode in OPERATORS else values[0]


# --- collectives

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    """One collective of a program.

    `bytes` is of the whole array once, per device and execution: what an all-gather gives, what a
    reduce-scatter is given. `groups` is as `groups` gives them. `dtypes` are those that are sent.
    """

    kind: str
    bytes: int
    times: int
    groups: np.ndarray
    dtypes: tuple[str, ...]

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]


def collectives(entry: Computation) -> list[Collective]:
    """The collectives of a program, without those of groups of one device.

    Raises:
      UnknownCost: one is in a loop whose trip count can't be told, or of a kind not known here.
    """
    found: dict[tuple, Collective] = {}
    for run in runs(entry):
        for what, instruction, place in _unwrapped(run.instruction):
            if run.times is None:
                raise UnknownCost(f"{instruction.name} ({instruction.op_name}) runs unknown times.")
            sent = [array for operand in instruction.operands for array in operand.arrays]
            members = groups(instruction)
            copies = members.shape[1] if what == "all-gather" else 1
            alone = instruction is run.instruction
            key = instruction.name if alone else instruction.text("channel_id", instruction.name)
            one = Collective(
                kind=what,
                bytes=copies * sum(array.bytes for array in sent),
                times=run.times,
                groups=members,
                dtypes=tuple(dict.fromkeys(array.dtype for array in sent)),
            )
            # Seen before in this loop, or around it: another link of the same chain of fusions.
            seen = (x for x in found if x[1:] == (place, key) and x[0] == run.loops[: len(x[0])])
            if alone or not any(seen):
                found[run.loops, place, key] = one
    return [one for one in found.values() if one.group_size > 1]


def _unwrapped(instruction: Instruction, scatter: str = "") -> Iterator[tuple]:
    """(kind, instruction, place) of the collectives that it is or wraps.

    `scatter` is the name of the fusion around it that is a reduce-scatter; then it is the place.
    """
    if instruction.opcode in ("fusion", "async-start", "custom-call"):
        for called in instruction.called():
            name = called.name if called.name.startswith("all-reduce-scatter") else scatter
            for inner in called.instructions.values():
                yield from _unwrapped(inner, name)
    elif what := kind(instruction):
        yield ("reduce-scatter", instruction, scatter) if scatter else (what, instruction, what)


def kind(instruction: Instruction) -> str:
    """Of KINDS; "" if it is no collective, or the end of one."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in ("ragged-all-to-all", "collective-broadcast"):
        raise UnknownCost(f"{instruction.name}: the bytes of {opcode}?")
    return opcode if opcode in KINDS else ""


IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"  # [16,16]T(1,0): 0 to 255 in this shape, transposed
LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)={({[\d,{}]*})}")
TILED = re.compile(rf"replica_groups=\[([\d,]+)\]<={IOTA}")
NAMED = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({IOTA}\))? {{((?:'\w+',?)*)}}"
)


def groups(instruction: Instruction) -> np.ndarray:
    """Device numbers, (groups, devices of a group); of a permutation, its (source, target) pairs.

    Raises:
      UnknownCost: the text is of no known form.
    """
    text = instruction.attributes
    if found := LISTED.search(text):
        return np.array([_numbers(group) for group in re.findall(r"{([\d,]*)}", found[1])])
    if found := TILED.search(text):
        return _iota(_numbers(found[2]), found[3]).reshape(_numbers(found[1]))
    if found := NAMED.search(text):  # along some axes of a mesh
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names, sizes = list(axes), list(axes.values())
        inner = [names.index(name) for name in re.findall(r"'(\w+)'", found[4])]
        outer = [i for i in range(len(names)) if i not in inner]
        shape = _numbers(found[2]) if found[2] else sizes
        devices = _iota(shape, found[3]).reshape(sizes).transpose(*outer, *inner)
        return devices.reshape(-1, math.prod(sizes[i] for i in inner))
    raise UnknownCost(f"{instruction.name}: which devices are {text[:200]}?")


def _iota(shape: list[int], permutation: str | None) -> np.ndarray:
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose(_numbers(permutation)) if permutation else devices


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


# --- traffic

FREE = (
    *("after-all", "bitcast", "constant", "get-tuple-element", "iota", "opt-barrier"),
    *("optimization-barrier", "parameter", "partition-id", "replica-id", "tuple"),
)
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = ("dynamic-slice", "slice")


def traffic(instruction: Instruction) -> int:
    """Bytes that one execution of an instruction moves, if it isn't inside a fusion."""
    opcode, operands, results = instruction.opcode, instruction.operands, instruction.arrays
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    if instruction.text("custom_call_target") in FREE_CALLS:
        return 0
    if opcode in ("fusion", "async-start"):
        inner = instruction.called()[0]
        if opcode == "async-start":  # (operands), results, context
            results = results[len(operands) :]
        read = sum(_read(inner, i, operand) for i, operand in enumerate(operands))
        return read + sum(_written(inner.root, array, i) for i, array in enumerate(results))
    if opcode == "copy-start":  # (destination, source, context)
        return _main(results[:2])
    if opcode in SLICES:
        return 2 * _main(results)
    if opcode == "dynamic-update-slice":
        return 2 * _main(operands[1].arrays)
    given = sum(_main(operand.arrays) for operand in operands)
    if kind(instruction) and opcode.endswith("-start"):
        return 2 * given
    return given + _main(results)


def _main(arrays: list[Array]) -> int:
    """Bytes of those in main memory."""
    return sum(array.bytes for array in arrays if not array.space)


def _read(inner: Computation, number: int, operand: Instruction) -> int:
    """Bytes that a fusion reads of its operand."""
    whole = _main(operand.arrays)
    for value in inner.instructions.values():
        if value.opcode == "parameter" and int(value.inside) == number:
            return min(whole, _used(value, whole)) if whole else 0
    return whole


def _used(value: Instruction, whole: int) -> int:
    """Bytes of `value` that its users in a fusion read; may be more than all of it."""
    total = 0
    for user in value.computation.instructions.values():
        for place, operand in enumerate(user.operands):
            if operand is not value:
                continue
            if user.opcode in SLICES and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode in ("bitcast", "tuple", "get-tuple-element"):
                total += _used(user, whole)
            elif user.opcode == "fusion":
                total += _read(user.called()[0], place, value)
            elif user.opcode != "dynamic-update-slice" or place:
                total += whole
    return total


def _written(root: Instruction, array: Array, number: int) -> int:
    """Bytes that a fusion with this root writes of its result `number`."""
    if root.opcode == "tuple":
        root = root.operands[number]
    while root.opcode == "bitcast":
        root = root.operands[0]
    if array.space or root.opcode == "parameter":  # handed through
        return 0
    if root.opcode == "dynamic-update-slice":
        return sum(array.bytes for array in root.operands[1].arrays)
    if root.opcode == "fusion" and root.called()[0].root.opcode != "tuple":
        return _written(root.called()[0].root, array, 0)
    return array.bytes


# --- FLOPs

CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
# Matmuls of queries x keys x head in cuDNN's attention. The gradient's fifth is the logits, which
# it computes again as the forward pass has not stored them.
FUSED_ATTENTION = {"__cudnn$fmhaSoftmax": 2, "__cudnn$fmhaSoftmaxBackward": 5}
# The same of JAX's splash attention, whose kernels have these names.
SPLASH = re.compile(r"splash_mha_(?:(fwd)|dkv)")
# Of custom calls whose work can't be read from the text: libraries' matmuls, and whole kernels.
OPAQUE = re.compile(
    r"gemm|matmul|dot|conv(?!ert)|blas|dnn|fmha|attention|triton|mosaic|tpu_custom", re.I
)


def flops(instruction: Instruction) -> int:
    """FLOPs of one execution, of all that it calls too; raises as `Computation.flops`."""
    opcode, target = instruction.opcode, instruction.text("custom_call_target")
    if opcode == "while":
        (condition,), (body,) = instruction.called("condition"), instruction.called("body")
        if not condition.flops and not body.flops:
            return 0  # whatever its trip count, which may be unknown
        if (trips := trip_count(instruction)) is None:
            raise UnknownCost(
                f"The loop {instruction.name} ({instruction.op_name}) has matmuls, but neither its "
                f"trip count nor a condition that gives it."
            )
        return trips * body.flops + (trips + 1) * condition.flops
    called = [computation.flops for computation in instruction.called()]
    if opcode == "conditional":
        return max(called)
    if opcode in ("fusion", "call", "async-start"):  # run what they call once
        return sum(called)
    if any(called) and opcode not in ("async-update", "async-done"):
        raise UnknownCost(f"{instruction.name}: a matmul inside {opcode} runs unknown times.")
    if target in FUSED_ATTENTION:
        # The first result, output or gradient of queries, is batch x heads x queries x head.
        queries, keys = instruction.dims[2], instruction.operands[1].dims
        return FUSED_ATTENTION[target] * 2 * queries * math.prod(keys)
    if target == "tpu_custom_call" and (kernel := SPLASH.match(instruction.name)):
        # The first large result, output or gradient of queries, is ... x queries x head.
        queries = next(x.dims for x in instruction.arrays if len(x.dims) >= 4)[-2]
        _, keys = [x.dims for x in instruction.operands if len(x.dims) == 4][:2]
        return (2 if kernel[1] else 5) * 2 * queries * math.prod(keys)
    if opcode == "convolution":
        return _convolution_flops(instruction)
    if opcode == "dot":
        found = re.search(r"\blhs_contracting_dims={([\d,]*)}", instruction.attributes)
    elif target in CUBLAS:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    elif opcode in ("ragged-dot", "scaled-dot") or OPAQUE.search(target):
        raise UnknownCost(f"{instruction.name}: the FLOPs of {target or opcode}?")
    else:
        return 0
    left = instruction.operands[0].dims
    contracted = [left[int(d)] for d in re.findall(r"\d+", found[1] if found else "")]
    return 2 * math.prod(instruction.dims) * math.prod(contracted)


def _convolution_flops(instruction: Instruction) -> int:
    """Each output, by the kernel's inputs, by the window's real elements.

    Groups of features are in the kernel's shape (inputs of one group), groups of the batch in the
    output's (the batch of one group).
    """
    inputs, kernel = (operand.dims for operand in instruction.operands)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window={([^}]*)}", instruction.attributes)  # none without spatial dims
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", window[1] if window else ""))
    spatial = sum(label.isdigit() for label in labels[1])

    def option(key: str, default: str) -> list[int]:
        values = window[key].split("x") if key in window else [default] * spatial
        return [int(value.split("_")[0]) for value in values]

    size, stride, padding = option("size", "1"), option("stride", "1"), option("pad", "0_0")
    holes, spread = option("lhs_dilate", "1"), option("rhs_dilate", "1")
    output = dict(zip(labels[3], instruction.dims))
    multiply_adds = output["b"] * output["f"] * kernel[labels[2].index("i")]
    for d in range(spatial):
        at = np.arange(output[str(d)])[:, None] * stride[d] + np.arange(size[d]) * spread[d]
        at -= padding[d]
        length = (inputs[labels[1].index(str(d))] - 1) * holes[d] + 1
        multiply_adds *= int(((at >= 0) & (at < length) & (at % holes[d] == 0)).sum())
    return 2 * multiply_adds
