"""How often a loop of an HLO program runs."""

import re
from dataclasses import dataclass

from supmim_jax.hlo.text import Computation, Instruction, Module

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
