"""The files of other libraries: arrays and JSON, read strictly, written whole or not at all.

Nothing is unpickled. A value in a JSON file is asked for by name and type, so that what an encoder
cannot express is refused with the name of its field.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from supmim_jax import storage
from supmim_jax.errors import SetupError
from supmim_jax.models import kmeans

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FLOATS = ("float32", "float16", "bfloat16")  # all of which float32 holds exactly


def check_free(out: str | os.PathLike) -> epath.Path:
    """The path `out`, at which there is nothing, or an empty directory.

    Raises:
      SetupError: there is something.
    """
    out = storage.location(out, searched=False)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SetupError(f"--out {out} already exists. Choose another, or remove it first.")
    return out


def write(out: str | os.PathLike, tensors: dict[str, Any], documents: dict[str, Any]) -> None:
    """Makes the directory `out` with model.safetensors, if there are tensors, and the documents.

    It is there whole or not at all. A document is what goes into a JSON file, a text, or a function
    that writes the file at the path that it is given.

    Raises:
      SetupError: it cannot be written, or is not free.
    """
    out = check_free(out)
    try:
        with storage.made(out, last=CONFIG) as part:
            if tensors:
                arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
                save_file(arrays, part / WEIGHTS, metadata={"format": "pt"})  # as PyTorch users ask
                os.chmod(part / WEIGHTS, 0o644)  # it is written for its owner alone
            for name, document in documents.items():
                if callable(document):
                    document(part / name)
                else:
                    text = document if isinstance(document, str) else json.dumps(document, indent=2)
                    (part / name).write_text(f"{text.rstrip()}\n")
    except OSError as error:
        raise SetupError(f"--out {out} cannot be written: {error}.") from None


def read_directory(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """Arrays, JSON documents and the weights' file name, from a directory or a file in it.

    Raises:
      SetupError: model.safetensors or config.json is missing or broken.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise SetupError(
            f"{weights} does not exist. --path takes a directory with {WEIGHTS} (one file, no "
            f"shards, no pickle) and config.json."
        )
    config = weights.parent / CONFIG
    if not config.is_file():
        raise SetupError(f"{config} does not exist; it says what model {weights.name} is.")
    documents = {CONFIG: read_json(config)}
    processor = weights.parent / "preprocessor_config.json"
    if processor.is_file():
        documents[processor.name] = read_json(processor)
    return read_safetensors(weights), documents, str(weights)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Its arrays as float32."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            return {name: _float32(file.get_tensor(name), name, path) for name in names}
    except (OSError, safetensors.SafetensorError, TypeError) as error:
        raise SetupError(f"{path} cannot be read as safetensors: {error}") from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Its arrays as float32."""
    try:
        arrays = kmeans.read(path)
    except ValueError as error:
        raise SetupError(f"{path} cannot be read as .npz: {error}") from None
    return {name: _float32(array, name, path) for name, array in arrays.items()}


def read_json(path: Path) -> Any:
    """The document of a JSON file."""
    return storage.read_json(path, "Expected JSON.")


def _float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise SetupError(f"{path}: {name} is {array.dtype}, expected {', '.join(FLOATS)}.")
    return array.astype(np.float32)


def library(directory: Path) -> str:
    """Which library wrote a directory: "timm" or "transformers"."""
    return "transformers" if "model_type" in read_json(directory / CONFIG) else "timm"


def strings(values: Any, count: int) -> tuple[str, ...]:
    """So many texts of a JSON list; () where it is anything else."""
    known = isinstance(values, list) and len(values) == count
    return tuple(values) if known and all(isinstance(x, str) for x in values) else ()


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

    def per_channel(
        self, key: str, default: float, channels: int, positive: bool = True
    ) -> tuple[float, ...]:
        """A number for each channel, or one for all; positive, or from 0."""
        value = self.values.get(key)
        value = default if value is None else value
        found = value if isinstance(value, list) else [value]
        if len(found) not in (1, channels) or not all(
            type(x) in (int, float) and (x > 0 or (x == 0 and not positive)) for x in found
        ):
            wanted = "a positive number" if positive else "a number from 0"
            raise SetupError(
                f"{self.file}: {key} is {value!r}, expected {wanted} for each of {channels} "
                f"channels, or one."
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
