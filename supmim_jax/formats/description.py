"""What a file's own config says about a ViT, read strictly."""

import math
from typing import Any, NamedTuple

from supmim_jax.config import SetupError, ViTConfig
from supmim_jax.formats.layout import Layout


class Foreign(NamedTuple):
    """A model in another library's files, in our terms: `positions` are always learned here."""

    model: ViTConfig
    num_classes: int
    image_size: int
    channels: int
    eval_resize: int
    layout: Layout


class Section:
    """A JSON object whose values are asked for by name and type."""

    def __init__(self, values: Any, file: str):
        if not isinstance(values, dict):
            raise SetupError(f"{file} is {values!r}, expected a JSON object.")
        self.values = values
        self.file = file

    def number(self, key: str, default: int | None = None) -> int:
        """A whole number, or the side of a square given as a pair."""
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        if type(value) is not int or value < 1:
            raise SetupError(
                f"{self.file}: {key} is {value!r}, expected a positive whole number (or a pair of "
                f"equal ones: images and patches are square here)."
            )
        return value

    def real(self, key: str, default: float) -> float:
        """A number that is not negative; null is the default."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise SetupError(f"{self.file}: {key} is {value!r}, expected a number from 0.")
        return float(value)

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
