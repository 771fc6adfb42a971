"""What a compiled program reads from and writes to main memory (HBM), instruction by instruction.

The operands and results of each instruction of the schedule, once each; of those inside a fusion
nothing, as they stay on the chip. An operand of which only slices are used counts as these, a
result that updates an operand in place as the update. What the layout puts into another memory
space (VMEM on TPU) costs nothing, but the copies that bring it there do.
"""

from collections.abc import Iterator
from typing import NamedTuple

from supmim_jax.hlo.collectives import kind
from supmim_jax.hlo.runs import Run, runs
from supmim_jax.hlo.text import Computation, Instruction, Module

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
