"""Every instruction that a program runs by itself, with how often it does."""

from collections.abc import Iterator
from typing import NamedTuple

from supmim_jax.hlo.text import Computation, Instruction, Module
from supmim_jax.hlo.trips import trip_count


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
