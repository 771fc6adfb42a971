"""What a compiled program sends between devices.

TPU runs most collectives asynchronously: one all-gather is then spread over a chain of fusions
that compute meanwhile, each of which repeats it with the same channel_id. It counts once. Outside
fusions a channel_id may be shared and each instruction counts. TPU also writes reduce-scatter as a
fusion `all-reduce-scatter` of an all-reduce and a slice, and gives these all one channel_id; each
counts, as a reduce-scatter.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from supmim_jax.hlo.groups import groups
from supmim_jax.hlo.runs import Run, runs
from supmim_jax.hlo.text import Computation, Instruction, Module, UnknownCost

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
