"""What a file's own config says about a ViT, read strictly."""

import math
from typing import Any, NamedTuple

from supmim_jax.config import SetupError, ViTConfig
from supmim_jax.formats.layout import Layout


class Foreign(NamedTuple):
    """A model in another library's files, in our terms: `positions` are always learned here.

    num_classes is 0 where there is no classifier. Arrays whose names begin with one of `leaves_out`
    are no part of the encoder. The model sees pixels in [0, 1] less `mean` and divided by `std`,
    which have a number per channel or one for all.
    """

    model: ViTConfig
    num_classes: int
    image_size: int
    channels: int
    eval_resize: int
    layout: Layout
    leaves_out: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5,)  # this encoder's: it sees pixels / 127.5 - 1
    std: tuple[float, ...] = (0.5,)


class Section:
    """A JSON object whose values are asked for by name and type."""

    def __init__(self, values: Any, file: str):
        if not isinstance(values, dict):
            raise SetupError(f"{file} is {values!r}, expected a JSON object.")
        self.values = values
        self.file = file

    def number(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A whole number, or the side of a square given as a pair."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < least:
            wanted = "a positive whole number" if least else "a whole number from 0"
            raise SetupError(
                f"{self.file}: {key} is {value!r}, expected {wanted} (or a pair of equal ones: "
                f"images and patches are square here)."
            )
        return value

    def per_channel(self, key: str, default: float, channels: int) -> tuple[float, ...]:
        """A positive number for each channel, or one for all."""
        value = self.values.get(key)
        value = default if value is None else value
        found = value if isinstance(value, list) else [value]
        if len(found) not in (1, channels) or not all(
            type(x) in (int, float) and x > 0 for x in found
        ):
            raise SetupError(
                f"{self.file}: {key} is {value!r}, expected a positive number for each of "
                f"{channels} channels, or one."
            )
        return tuple(map(float, found))

    def real(self, key: str, default: float) -> float:
        """A number that is not negative; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise SetupError(f"{self.file}: {key} is {value!r}, expected a number from 0.")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not bool:
            raise SetupError(f"{self.file}: {key} is {value!r}, expected true or false.")
        return value

    def one_of(self, key: str, known: dict[Any, Any], default: Any) -> Any:
        """The meaning of a value that must be among the known ones."""
        value = self.values.get(key, default)
        if isinstance(value, list | dict) or value not in known:
            raise SetupError(
                f"{self.file}: {key} is {value!r}, which this encoder cannot express; known are "
                f"{', '.join(map(repr, known))}."
            )
        return known[value]

    def same(self, key: str, wanted: Any, default: Any, why: str) -> None:
        """Raises SetupError unless the value, or each of its list, is the wanted one."""
        value = self.values.get(key, default)
        entries = value if isinstance(value, list) and value else [value]
        if any(entry != wanted for entry in entries):
            raise SetupError(f"{self.file}: {key} is {value!r}, expected {wanted!r}: {why}")


def root(rows: int, file: str, name: str) -> int:
    """The side of a square grid of this many positions."""
    side = math.isqrt(rows)
    if side * side != rows or not rows:
        raise SetupError(f"{file}: {name} has {rows} patch positions, expected a square number.")
    return side
