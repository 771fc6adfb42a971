"""The files of other libraries: arrays and JSON, read strictly, written whole or not at all.

Nothing is unpickled. JSON values are read by name and type, so that whatever an encoder cannot
express is refused with the name of its field.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from supmim_jax import storage
from supmim_jax.errors import SetupError
from supmim_jax.models import kmeans

WEIGHTS, CONFIG, PROCESSOR = "model.safetensors", "config.json", "preprocessor_config.json"
FLOATS = ("float32", "float16", "bfloat16")  # all of which float32 holds exactly


def check_free(out: str | os.PathLike) -> epath.Path:
    """The path `out`; raises SetupError if there is more than an empty directory."""
    out = storage.location(out, searched=False)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise SetupError(f"--out {out} already exists. Choose another, or remove it first.")
    return out


def write(out: os.PathLike, tensors: dict[str, Any], documents: dict[str, Any]) -> None:
    """Makes the directory `out` with model.safetensors, if there are tensors, and the documents.

    It is there whole or not at all. A document is what goes into a JSON file, a text, or a function
    that writes the file at the path that it is given.

    Raises:
      SetupError: it cannot be written.
    """
    try:
        with storage.made(epath.Path(out), last=CONFIG) as part:
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


class Saved(NamedTuple):
    """What timm or transformers has saved."""

    file: str  # the path of model.safetensors
    arrays: dict[str, np.ndarray]
    config: "Section"
    processor: "Section"


def read_directory(path: Path) -> Saved:
    """What is in a directory, or beside a file of weights.

    Raises:
      SetupError: model.safetensors or config.json is missing or broken.
    """
    weights = path / WEIGHTS if path.is_dir() else path
    config, processor = weights.with_name(CONFIG), weights.with_name(PROCESSOR)
    for file in (weights, config):
        if not file.is_file():
            raise SetupError(
                f"{file} does not exist. --path takes a directory with {WEIGHTS} (one file, no "
                f"shards, no pickle) and {CONFIG}, which says what model it is."
            )
    cure = "Expected JSON."
    preprocessing = storage.read_json(processor, cure) if processor.is_file() else {}
    return Saved(
        file=str(weights),
        arrays=read_safetensors(weights),
        config=Section(storage.read_json(config, cure), str(config)),
        processor=Section(preprocessing or {}, str(processor)),
    )


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Its arrays as float32."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            names = file.keys()
            return _floats({name: file.get_tensor(name) for name in names}, path)
    except (OSError, safetensors.SafetensorError, TypeError) as error:
        raise SetupError(f"{path} cannot be read as safetensors: {error}") from None
    except AttributeError as error:  # safetensors looks the type up in NumPy, as float8_e4m3fn
        expected = f"expected {', '.join(FLOATS)}. Convert it first"
        raise SetupError(f"{path} has an array of another type: {error}; {expected}.") from None


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Its arrays as float32."""
    try:
        return _floats(kmeans.read(path), path)
    except ValueError as error:
        raise SetupError(f"{path} cannot be read as .npz: {error}") from None


def _floats(arrays: dict[str, np.ndarray], path: Path) -> dict[str, np.ndarray]:
    for name, array in arrays.items():
        if array.dtype.name not in FLOATS:
            raise SetupError(f"{path}: {name} is {array.dtype}, expected {', '.join(FLOATS)}.")
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def strings(values: Any, count: int) -> tuple[str, ...]:
    """So many texts of a JSON list; () where it is anything else."""
    known = isinstance(values, list) and len(values) == count
    return tuple(values) if known and all(isinstance(x, str) for x in values) else ()


class Section:
    """A JSON object whose values are asked for by name and type; null is the default."""

    def __init__(self, values: Any, file: str):
        if not isinstance(values, dict):
            raise SetupError(f"{file} is {values!r}, expected a JSON object.")
        self.values, self.file = values, file

    def section(self, key: str) -> "Section":
        """The object of this name; an empty one where there is none."""
        return Section(self.values.get(key) or {}, f"{self.file}, {key}")

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive whole number, or the side of a square given as a pair."""
        value = self.get(key, default)
        if isinstance(value, list) and len(value) == 2 and value[0] == value[1]:
            value = value[0]
        known = type(value) is int and value > 0
        return self._known(key, value, known, "a positive whole number, or a pair of equal ones")

    def reals(
        self, key: str, default: float, count: int = 1, positive: bool = False
    ) -> tuple[float, ...]:
        """So many numbers, or one for all; from 0, or positive."""
        value = self.get(key, default)
        found = value if isinstance(value, list) else [value]
        known = len(found) in (1, count) and all(
            type(x) in (int, float) and 0 <= x < math.inf and (x or not positive) for x in found
        )
        kind = "a positive number" if positive else "a number from 0"
        self._known(key, value, known, kind if count == 1 else f"{kind} for each of {count}")
        return tuple(map(float, found))

    def real(self, key: str, default: float, positive: bool = False) -> float:
        return self.reals(key, default, positive=positive)[0]

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        return self._known(key, value, type(value) is bool, "true or false")

    def one_of(self, key: str, known: dict[Any, Any], default: Any) -> Any:
        """The meaning of a value that must be among the known ones; null is not the default."""
        value = self.values.get(key, default)
        is_known = not isinstance(value, list | dict) and value in known
        self._known(key, value, is_known, f"what this encoder has: {', '.join(map(repr, known))}")
        return known[value]

    def same(self, key: str, wanted: Any, default: Any, why: str) -> None:
        """Raises SetupError unless the value is the wanted one; null is not the default."""
        value = self.values.get(key, default)
        self._known(key, value, value == wanted, f"{wanted!r}: {why}")

    def _known(self, key: str, value: Any, known: bool, expected: str) -> Any:
        if not known:
            raise SetupError(f"{self.file}: {key} is {value!r}, expected {expected}.")
        return value
