"""The HLO text of a compiled program as data, and what it costs: FLOPs, collectives, HBM traffic.

`cost_analysis()` counts the body of a loop once, whatever its trip count; this walks the program
from its entry and multiplies. The text of a partitioned program is that of one device.

FLOPs are of matmuls and convolutions; a multiply-add is 2. In convolutions only multiply-adds with
an element of the input count, not those with padding or with the holes of a dilated input: so a
strided convolution and its gradients cost the same, and so do TPU's matmuls written as
convolutions.

Collectives: TPU runs most of them asynchronously. One all-gather is then spread over a chain of
fusions that compute meanwhile, each of which repeats it with the same channel_id; it counts once.
Outside fusions a channel_id may be shared and each instruction counts. TPU also writes
reduce-scatter as a fusion `all-reduce-scatter` of an all-reduce and a slice, and gives these all
one channel_id; each counts, as a reduce-scatter.

Traffic is what the operands and results of each scheduled instruction move, once each; of those
inside a fusion nothing, as they stay on the chip. An operand of which only slices are used counts
as these, a result that updates an operand in place as the update. What the layout puts into another
memory space (VMEM on TPU) costs nothing, but the copies that bring it there do.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np


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


def parse(text: str) -> Module:
    """Reads what `compiled.as_text()` gives.

    Raises:
      ValueError: there is no ENTRY computation.
    """
    computations, entry, current = {}, None, None
    for line in text.splitlines():
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
    return Module(computations, entry)


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


NUMBERS = r"\[([\d,]+)\]"
IOTA = rf"{NUMBERS}(?:T\(([\d,]+)\))?"  # [16,16]T(1,0): 0 to 255 in this shape, transposed
LISTED = re.compile(r"\b(?:replica_groups|source_target_pairs)={({[\d,{}]*})}")
TILED = re.compile(rf"replica_groups={NUMBERS}<={IOTA}")
NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? {((?:'\w+',?)*)}")


def groups(instruction: Instruction) -> np.ndarray:
    """Device numbers, (groups, devices of a group); of a permutation, its (source, target) pairs.

    Raises:
      UnknownCost: the text is of no known form.
    """
    text = instruction.attributes
    if found := LISTED.search(text):
        return np.array([_numbers(group) for group in re.findall(r"{([\d,]*)}", found[1])])
    if found := TILED.search(text):
        return _iota(found[2], found[3]).reshape(_numbers(found[1]))
    if found := NAMED.search(text):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        names = re.findall(r"'(\w+)'", found[3])
        return _along(axes, names, found[2])
    raise UnknownCost(f"{instruction.name}: which devices are {text[:200]}?")


def _along(axes: dict[str, int], names: list[str], ids: str | None) -> np.ndarray:
    """Groups along some axes of a named mesh; `ids` is its order of devices, None as counted."""
    shape = tuple(axes.values())
    found = re.fullmatch(IOTA, ids or "")
    devices = _iota(found[1], found[2]) if found else np.arange(np.prod(shape))
    position = list(axes)
    inner = [position.index(name) for name in names]
    outer = [i for i in range(len(shape)) if i not in inner]
    size = int(np.prod([shape[i] for i in inner]))
    return devices.reshape(shape).transpose(*outer, *inner).reshape(-1, size)


def _iota(shape: str, permutation: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    devices = np.arange(np.prod(sizes)).reshape(sizes)
    return devices.transpose(_numbers(permutation)) if permutation else devices


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",") if n]


class Run(NamedTuple):
    instruction: Instruction
    computation: Computation
    place: tuple[str, ...]  # names of the loops around it, outermost first
    times: int | None  # None: in a loop whose trip count can't be told


def runs(module: Module) -> Iterator[Run]:
    """Instructions of the entry, of bodies of loops and of called computations.

    Not those inside fusions, nor of conditions of loops. Of a conditional all branches are given.
    """
    return _inside(module, module.entry, (), 1)


def _inside(module: Module, name: str, place: tuple[str, ...], times: int | None) -> Iterator[Run]:
    computation = module.computations[name]
    for instruction in computation.instructions.values():
        if instruction.opcode == "while":
            trips = trip_count(instruction, computation, module)
            inner = None if None in (trips, times) else times * trips
            (body,) = instruction.called("body")
            yield from _inside(module, body, (*place, instruction.name), inner)
        elif instruction.opcode in ("call", "conditional"):
            for called in instruction.called():
                yield from _inside(module, called, place, times)
        else:
            yield Run(instruction, computation, place, times)


TRANSPARENT = ("copy", "convert", "bitcast", "reshape")
SCALAR = re.compile(r"[su]\d+\[\]")
FLIPPED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE", "NE": "NE", "EQ": "EQ"}


@dataclass(frozen=True)
class Counting:
    """An integer inside a loop: element `index` of the loop's state, or nothing, plus `plus`."""

    index: int | None
    plus: int


class State:
    """The loop's whole state."""


Value = Counting | State | None  # None: not known


def trip_count(loop: Instruction, computation: Computation, module: Module) -> int | None:
    """Executions of the body of a `while`, None if they can't be told.

    CPU and GPU note them in the backend's config. TPU doesn't: there the condition must compare a
    counter, which starts at a constant and moves by one, with a constant or with a state element
    that starts at one and never changes.
    """
    known = re.search(r'"known_trip_count":\s*{\s*"n":\s*"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    compared = comparison(module, module.computations[condition], (State(),))
    if compared is None:
        return None
    direction, left, right = compared

    def start(value: Counting) -> int | None:
        if value.index is None:
            return value.plus
        first = element(module, computation, loop.operands[0], value.index, ())
        constant = isinstance(first, Counting) and first.index is None
        return first.plus + value.plus if constant else None

    def step(value: Counting) -> int | None:
        if value.index is None:
            return 0
        inside = module.computations[body]
        then = element(module, inside, inside.root.name, value.index, (State(),))
        same = isinstance(then, Counting) and then.index == value.index
        return then.plus if same else None

    if step(left) == 0:
        direction, left, right = FLIPPED[direction], right, left
    values = start(left), start(right), step(left)
    if None in values or step(right) != 0:
        return None
    return steps(direction, *values)


def steps(direction: str, first: int, limit: int, step: int) -> int | None:
    """How often `first direction limit` holds as `first` moves by `step`; None: for ever."""
    if direction in ("LT", "LE") and step > 0:
        return len(range(first, limit + (direction == "LE"), step))
    if direction in ("GT", "GE") and step < 0:
        return len(range(first, limit - (direction == "GE"), step))
    if direction == "NE" and step and (limit - first) % step == 0 and (limit - first) / step >= 0:
        return (limit - first) // step
    return None


def comparison(module: Module, computation: Computation, arguments: tuple[Value, ...]):
    """(direction, left, right) of the comparison that a computation returns, or None."""
    root = computation.root
    while root.opcode in TRANSPARENT:
        root = computation.instructions[root.operands[0]]
    values = [evaluate(module, computation, name, arguments) for name in root.operands]
    if root.opcode in ("fusion", "call"):
        (called,) = root.called("calls", "to_apply")
        return comparison(module, module.computations[called], tuple(values))
    if root.opcode != "compare" or not all(isinstance(v, Counting) for v in values):
        return None
    return root.text("direction"), *values


def element(module, computation: Computation, name: str, index: int, arguments) -> Value:
    """Element `index` of the tuple `name`."""
    tuple_ = computation.instructions[name]
    if tuple_.opcode == "copy":
        return element(module, computation, tuple_.operands[0], index, arguments)
    if tuple_.opcode != "tuple":
        return None
    return evaluate(module, computation, tuple_.operands[index], arguments)


def evaluate(module, computation: Computation, name: str, arguments: tuple[Value, ...]) -> Value:
    """The value of an instruction given those of its computation's parameters."""
    instruction = computation.instructions[name]
    opcode = instruction.opcode
    if opcode == "parameter":
        number = int(instruction.inside)
        return arguments[number] if number < len(arguments) else None
    if not SCALAR.match(instruction.shape):
        return None
    if opcode == "constant":
        return Counting(None, int(instruction.inside))
    values = [evaluate(module, computation, operand, arguments) for operand in instruction.operands]
    if opcode == "get-tuple-element" and isinstance(values[0], State):
        return Counting(int(instruction.text("index")), 0)
    if opcode in TRANSPARENT:
        return values[0]
    if opcode in ("fusion", "call"):
        called = module.computations[instruction.called("calls", "to_apply")[0]]
        return evaluate(module, called, called.root.name, tuple(values))
    if opcode in ("add", "subtract") and all(isinstance(v, Counting) for v in values):
        left, right = values
        sign = 1 if opcode == "add" else -1
        if right.index is None:
            return Counting(left.index, left.plus + sign * right.plus)
        if left.index is None and sign == 1:
            return Counting(right.index, left.plus + right.plus)
    return None


KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
UNKNOWN = ("ragged-all-to-all", "collective-broadcast")
SCATTER = "all-reduce-scatter"
WRAPPERS = ("fusion", "async-start", "custom-call")


@dataclass(frozen=True)
class Collective:
    """One collective of a program.

    `bytes` is of the whole array once, per device and execution: what an all-gather gives, what a
    reduce-scatter is given. `groups` is as in `groups.groups`. `dtypes` are those that are sent.
    """

    kind: str
    bytes: int
    times: int
    groups: np.ndarray
    dtypes: tuple[str, ...]
    op_name: str

    @property
    def group_size(self) -> int:
        return self.groups.shape[1]


def find(module: Module) -> list[Collective]:
    """The collectives of a program, without those of groups of one device.

    Raises:
      UnknownCost: one is in a loop whose trip count can't be told, or of a kind not known here.
    """
    found: dict[tuple, Collective] = {}
    for run in runs(module):
        for wrapper, instruction, computation in _unwrapped(run, module):
            collective = _collective(instruction, computation, run.times, wrapper)
            alone = instruction is run.instruction
            key = instruction.name if alone else instruction.text("channel_id", instruction.name)
            found.setdefault((run.place, wrapper or collective.kind, key), collective)
    return [c for c in found.values() if c.group_size > 1]


def _unwrapped(run: Run, module: Module) -> Iterator[tuple[str, Instruction, Computation]]:
    """Collectives that a run is or wraps; first the fusion's name if it is a reduce-scatter."""
    todo = [("", run.instruction, run.computation)]
    while todo:
        wrapper, instruction, computation = todo.pop()
        if instruction.opcode in WRAPPERS:
            for name in instruction.called():
                inner = module.computations[name]
                scatter = name if name.startswith(SCATTER) else wrapper
                todo += [(scatter, inside, inner) for inside in inner.instructions.values()]
        elif kind(instruction):
            yield wrapper, instruction, computation


def kind(instruction: Instruction) -> str:
    """Of KINDS; "" if it is no collective, or the end of one."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode in UNKNOWN:
        raise UnknownCost(f"{instruction.name}: the bytes of {opcode}?")
    return opcode if opcode in KINDS else ""


def _collective(
    instruction: Instruction, computation: Computation, times: int | None, wrapper: str
) -> Collective:
    if times is None:
        raise UnknownCost(f"{instruction.name} ({instruction.op_name}) runs unknown times.")
    what = kind(instruction)
    sent = [a for o in instruction.operands for a in computation.instructions[o].arrays]
    members = groups(instruction)
    copies = members.shape[1] if what == "all-gather" else 1
    return Collective(
        kind="reduce-scatter" if wrapper else what,
        bytes=copies * sum(a.bytes for a in sent),
        times=times,
        groups=members,
        dtypes=tuple(dict.fromkeys(a.dtype for a in sent)),
        op_name=instruction.op_name,
    )


FREE = (
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "iota",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
)
FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AsyncCollectiveStart", "AsyncCollectiveDone")
SLICES = ("dynamic-slice", "slice")
PASSED_ON = ("bitcast", "tuple", "get-tuple-element")


class Traffic(NamedTuple):
    run: Run
    bytes: int  # of one execution
    overlaps: bool  # a copy that runs beside other instructions


def traffic(module: Module) -> Iterator[Traffic]:
    """What each instruction of the schedule moves; those that move nothing too."""
    for run in runs(module):
        opcode = run.instruction.opcode
        yield Traffic(
            run, moved(run.instruction, run.computation, module), opcode.endswith("start")
        )


def moved(instruction: Instruction, computation: Computation, module: Module) -> int:
    """Bytes of one execution of an instruction that isn't inside a fusion."""
    opcode = instruction.opcode
    if opcode in FREE or opcode.endswith("-done") or _free_call(instruction):
        return 0
    operands = [computation.instructions[name] for name in instruction.operands]
    if opcode in ("fusion", "async-start"):
        inner = module.computations[instruction.called()[0]]
        inputs = sum(_read(inner, i, operand, module) for i, operand in enumerate(operands))
        outputs = instruction.arrays
        if opcode == "async-start":  # (operands), results, context
            outputs = outputs[len(operands) :]
        return inputs + sum(_written(inner, array, i, module) for i, array in enumerate(outputs))
    if opcode == "copy-start":  # (destination, source, context)
        return sum(_main(array) for array in instruction.arrays[:2])
    if opcode in SLICES:
        return 2 * sum(_main(array) for array in instruction.arrays)
    if opcode == "dynamic-update-slice":
        return 2 * sum(_main(array) for array in operands[1].arrays)
    arrays = [array for operand in operands for array in operand.arrays]
    if kind(instruction) and opcode.endswith("-start"):
        return 2 * sum(_main(array) for array in arrays)
    return sum(_main(array) for array in (*arrays, *instruction.arrays))


def _free_call(instruction: Instruction) -> bool:
    return instruction.text("custom_call_target") in FREE_CALLS


def _main(array) -> int:
    return 0 if array.space else array.bytes


def _read(inner: Computation, number: int, operand: Instruction, module: Module) -> int:
    """Bytes that a fusion reads of its operand."""
    whole = sum(_main(array) for array in operand.arrays)
    if not whole:
        return 0
    found = (
        p
        for p in inner.instructions.values()
        if p.opcode == "parameter" and int(p.inside) == number
    )
    parameter = next(found, None)
    return whole if parameter is None else min(whole, _used(inner, parameter, whole, module))


def _used(inner: Computation, value: Instruction, whole: int, module: Module) -> int:
    """Bytes of `value` that its users in a fusion read; at most all of them together."""
    total = 0
    for user in inner.instructions.values():
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in SLICES and place == 0:
                total += sum(array.bytes for array in user.arrays)
            elif user.opcode in PASSED_ON:
                total += _used(inner, user, whole, module)
            elif user.opcode == "dynamic-update-slice" and place == 0:
                total += 0
            elif user.opcode == "fusion":
                deeper = module.computations[user.called()[0]]
                total += _read(deeper, place, value, module)
            else:
                total += whole
    return total


def _written(inner: Computation, array, number: int, module: Module) -> int:
    """Bytes that a fusion writes of its result `number`."""
    if array.space:
        return 0
    root = inner.root
    if root.opcode == "tuple":
        root = inner.instructions[root.operands[number]]
    while root.opcode == "bitcast":
        root = inner.instructions[root.operands[0]]
    if root.opcode == "parameter":  # handed through
        return 0
    if root.opcode == "dynamic-update-slice":
        return sum(a.bytes for a in inner.instructions[root.operands[1]].arrays)
    if root.opcode == "fusion":
        deeper = module.computations[root.called()[0]]
        return _written(deeper, array, 0, module) if deeper.root.opcode != "tuple" else array.bytes
    return array.bytes


CUBLAS = ("__cublas$gemm", "__cublas$lt$matmul", "__cublas$lt$matmul$f8")
# cuDNN's attention: matmuls of queries x keys x head that the arithmetic asks for, and those that
# it repeats because it hasn't stored the logits.
FUSED_ATTENTION = {"__cudnn$fmhaSoftmax": (2, 0), "__cudnn$fmhaSoftmaxBackward": (4, 1)}
# Of custom calls whose work can't be read from the text: libraries' matmuls, and whole kernels.
OPAQUE = re.compile(
    r"gemm|matmul|dot|conv(?!ert)|blas|dnn|fmha|attention|triton|mosaic|tpu_custom", re.I
)
OPAQUE_OPS = ("ragged-dot", "scaled-dot")
CALLERS = ("fusion", "call", "async-start")  # run what they call once
# What models, objectives and the train step say by jax.named_scope.
SCOPES = (
    *("tokenizer", "decoder", "contrastive", "patch_embedding", "encoder", "MLP", "attention"),
    *("masks", "mixing", "optimizer"),
)


@dataclass(frozen=True)
class Counts:
    """FLOPs of one execution.

    `by_scope` splits them by "forward", "backward" or "recomputed" (by jax.checkpoint), and by the
    names of jax.named_scope, outermost first: "forward: encoder/MLP/attention".
    """

    flops: int
    by_scope: dict[str, int]


def count(text: str) -> Counts:
    """The FLOPs of `compiled.as_text()`.

    Of a conditional the most expensive branch counts. A loop without matmuls costs nothing, so its
    trip count may be unknown.

    Raises:
      UnknownCost: a loop with matmuls whose trip count can't be found, or a call that looks like a
        matmul and isn't known here.
    """
    return count_module(parse(text))


def count_module(module: Module) -> Counts:
    """`count` of a text that is parsed."""
    by_scope = FlopWalk(module).computation_cost(module.entry)
    return Counts(sum(by_scope.values()), dict(sorted(by_scope.items())))


class FlopWalk:
    """Costs of computations, each a Counter of FLOPs by scope, worked out once."""

    def __init__(self, module: Module):
        self.module = module
        self.known: dict[str, Counter] = {}

    def computation_cost(self, name: str) -> Counter:
        if name not in self.known:
            computation = self.module.computations[name]
            total = Counter()
            for instruction in computation.instructions.values():
                total.update(self.instruction_cost(instruction, computation))
            self.known[name] = total
        return self.known[name]

    def instruction_cost(self, instruction: Instruction, computation: Computation) -> Counter:
        opcode = instruction.opcode
        if opcode == "while":
            return self.loop_cost(instruction, computation)
        called = [self.computation_cost(name) for name in instruction.called()]
        if opcode == "conditional":
            return max(called, key=Counter.total)
        if opcode in CALLERS:
            return sum(called, Counter())
        if any(called) and opcode not in ("async-update", "async-done"):
            raise UnknownCost(f"{instruction.name}: a matmul inside {opcode} runs unknown times.")
        if instruction.text("custom_call_target") in FUSED_ATTENTION:
            return attention_cost(instruction, computation, scope(instruction))
        flops = matmul_flops(instruction, computation)
        return Counter({scope(instruction): flops}) if flops else Counter()

    def loop_cost(self, loop: Instruction, computation: Computation) -> Counter:
        (condition,), (body,) = loop.called("condition"), loop.called("body")
        condition_cost, body_cost = self.computation_cost(condition), self.computation_cost(body)
        if not condition_cost and not body_cost:
            return Counter()
        trips = trip_count(loop, computation, self.module)
        if trips is None:
            raise UnknownCost(
                f"The loop {loop.name} ({loop.op_name}) has matmuls, but neither its trip count "
                f"nor a condition that gives it."
            )
        times = Counter({name: flops * trips for name, flops in body_cost.items()})
        times.update({name: flops * (trips + 1) for name, flops in condition_cost.items()})
        return times


def attention_cost(call: Instruction, computation: Computation, where: str) -> Counter:
    """FLOPs of a kernel of cuDNN by scope; `where` is that of the call.

    Its first result, the output or the queries' gradient, is always batch x heads x queries x head.
    """
    needed, repeated = FUSED_ATTENTION[call.text("custom_call_target")]
    queries = call.dims[2]
    result, keys = (
        math.prod(x) for x in (call.dims, computation.instructions[call.operands[1]].dims)
    )
    matmul = 2 * result * (keys * queries // result)
    cost = Counter({where: needed * matmul})
    if repeated:
        cost[f"recomputed: {where.partition(': ')[2]}"] += repeated * matmul
    return cost


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of one instruction by itself, 0 if it is no matmul or convolution."""

    def operand(i: int) -> tuple[int, ...]:
        return computation.instructions[instruction.operands[i]].dims

    target = instruction.text("custom_call_target")
    if instruction.opcode == "dot":
        contracted = instruction.ints("lhs_contracting_dims")
    elif instruction.opcode == "convolution":
        return convolution_flops(instruction, operand(0), operand(1))
    elif target in CUBLAS:
        found = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
        contracted = tuple(int(d) for d in re.findall(r"\d+", found[1]))
    elif instruction.opcode in OPAQUE_OPS or OPAQUE.search(target):
        raise UnknownCost(f"{instruction.name}: the FLOPs of {target or instruction.opcode}?")
    else:
        return 0
    return 2 * math.prod(instruction.dims) * math.prod(operand(0)[d] for d in contracted)


def convolution_flops(instruction: Instruction, inputs: tuple, kernel: tuple) -> int:
    """FLOPs of a convolution: each output, by the kernel's inputs, by the window's real elements.

    Groups of features are in the kernel's shape (inputs of one group), groups of the batch in the
    output's (the batch of one group).
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    window = re.search(r"window={([^}]*)}", instruction.attributes)  # none without spatial dims
    window = dict(re.findall(r"(\w+)=([\d_x-]+)", window[1] if window else ""))
    spatial = sum(label.isdigit() for label in labels[1])

    def option(key: str, default: str) -> list[str]:
        return window[key].split("x") if key in window else [default] * spatial

    size = [int(n) for n in option("size", "1")]
    stride = [int(n) for n in option("stride", "1")]
    padding = [int(n.split("_")[0]) for n in option("pad", "0_0")]
    holes = [int(n) for n in option("lhs_dilate", "1")]
    spread = [int(n) for n in option("rhs_dilate", "1")]
    output = dict(zip(labels[3], instruction.dims))
    multiply_adds = output["b"] * output["f"] * kernel[labels[2].index("i")]
    for d in range(spatial):
        at = np.arange(output[str(d)])[:, None] * stride[d] + np.arange(size[d]) * spread[d]
        at -= padding[d]
        length = (inputs[labels[1].index(str(d))] - 1) * holes[d] + 1
        multiply_adds *= int(((at >= 0) & (at < length) & (at % holes[d] == 0)).sum())
    return 2 * multiply_adds


def scope(instruction: Instruction) -> str:
    """As in `Counts.by_scope`."""
    name = instruction.op_name
    direction = "forward"
    if "rematted_computation" in name:
        direction = "recomputed"
    elif re.search(r"(^|/)transpose\(", name):
        direction = "backward"
    return f"{direction}: {'/'.join(scopes(name)) or 'none'}"


def scopes(op_name: str) -> list[str]:
    """The names of SCOPES that an operation was traced in, outermost first."""
    return [name for name in re.findall(r"\w+", op_name) if name in SCOPES]
