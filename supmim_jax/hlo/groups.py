"""Which devices take part in a collective, from its `replica_groups`."""

import re

import numpy as np

from supmim_jax.hlo.text import Instruction, UnknownCost

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
