"""Reading and writing the files themselves: no pickle, and all of a directory or nothing."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from etils import epath
from safetensors.numpy import save_file

from supmim_jax import storage
from supmim_jax.config import SetupError
from supmim_jax.models import npz

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


def write(out: str | os.PathLike, tensors: dict[str, Any], documents: dict[str, dict]) -> None:
    """Makes the directory `out` with model.safetensors and the JSON documents, or nothing.

    Raises:
      SetupError: it cannot be written, or is not free.
    """
    out = check_free(out)
    try:
        with storage.made(out, last=CONFIG) as part:
            arrays = {name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}
            save_file(arrays, part / WEIGHTS, metadata={"format": "pt"})  # what PyTorch users ask
            os.chmod(part / WEIGHTS, 0o644)  # it is written for its owner alone
            for name, document in documents.items():
                (part / name).write_text(json.dumps(document, indent=2) + "\n")
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
        arrays = npz.read(path)
    except ValueError as error:
        raise SetupError(f"{path} cannot be read as .npz: {error}") from None
    return {name: _float32(array, name, path) for name, array in arrays.items()}


def read_json(path: Path) -> Any:
    """The document of a JSON file."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SetupError(f"{path} cannot be read as JSON: {error}") from None


def _float32(array: np.ndarray, name: str, path: Path) -> np.ndarray:
    if array.dtype.name not in FLOATS:
        raise SetupError(f"{path}: {name} is {array.dtype}, expected {', '.join(FLOATS)}.")
    return array.astype(np.float32)
