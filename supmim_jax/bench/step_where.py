"""Where a step's time goes: a profile of it, each operation given to the part that traced it.

The profiler (jax.profiler, read without TensorFlow) names operations as the compiled program does,
whose text has the Python functions that traced each.
"""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from supmim_jax.rehearse import flops, hlo
from supmim_jax.rehearse.hlo import Instruction, Module

# The first part one of whose functions an operation was traced in; optax's have an update_fn.
TIMED = (
    *(found for found in flops.PARTS if found[1] not in ("encoder", "head")),
    ("Block.attend", "attention"),
    ("Block.__call__", "MLP"),
    ("ViT.encode", "encoder, between blocks"),
    ("SupMIM.mask", "masks"),
    ("MAE.mask", "masks"),
    ("mix", "mixing"),
    ("update_fn", "optimizer"),
    ("apply_updates", "optimizer"),
    ("norm", "optimizer"),
)
LOSS_AND_HEAD = "head and losses"
UNNAMED = "copies and fills of the compiler"
CONTAINERS = ("while", "call", "conditional")  # their time is that of what they run


def shares(run: Callable[[], None], text: str) -> dict[str, float]:
    """Share of the device's operation time by part, largest first; {} if the profile has none.

    Args:
      run: runs some steps to their end.
      text: `as_text()` of the compiled step.
    """
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        files = Path(directory).rglob("*.xplane.pb")
        profiles = [jax.profiler.ProfileData.from_file(str(path)) for path in files]
        spent = by_part(text, (pair for profile in profiles for pair in operations(profile)))
    total = sum(spent.values())
    return {name: time / total for name, time in spent.most_common()}


def operations(profile) -> Iterator[tuple[str, float]]:
    """Names in the program, and nanoseconds, of what ran of a module called step.

    CPU and GPU say so in the statistics of each event; what doesn't is left out.
    """
    for plane in profile.planes:
        for line in plane.lines:
            for event in line.events:
                said = dict(event.stats)
                if "hlo_op" in said and "step" in str(said.get("hlo_module")):
                    yield said["hlo_op"], event.duration_ns


def by_part(text: str, operations) -> Counter:
    """Nanoseconds by part; of operations that the text doesn't have, under UNNAMED."""
    module = hlo.parse(text)
    known = {
        name: instruction
        for computation in module.computations.values()
        for name, instruction in computation.instructions.items()
    }
    spent = Counter()
    for name, time in operations:
        instruction = known.get(name)
        if instruction is None or instruction.opcode not in CONTAINERS:
            spent[part_of(instruction, module)] += time
    return spent


def part_of(instruction: Instruction | None, module: Module) -> str:
    """The part of the step that an operation belongs to."""
    functions = module.functions(instruction) if instruction else ()
    if not functions:
        return UNNAMED
    names = {function.rpartition("<locals>.")[2] for function in functions}
    return next((part for function, part in TIMED if function in names), LOSS_AND_HEAD)
