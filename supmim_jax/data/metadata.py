"""What a data set from elsewhere may say of itself: a name, and the classes of its features."""

import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from supmim_jax.config import SetupError

NAME = re.compile(r"\w[\w-]*(/\w[\w.+-]*)?(:[\d*]+\.[\d*]+\.[\d*]+)?", re.ASCII)
FEATURES = "features.json"
CLASS_KEYS = ("type", "pythonClassName", "python_class_name")  # of a class in features.json


def check_name(name: str, field: str) -> None:
    """Raises SetupError unless it is a name as tfds gives them, which leads to no other place."""
    if not NAME.fullmatch(name):
        raise SetupError(
            f"{field} is {name!r}, which is no name of a data set: give <name>, <name>/<config> or "
            f"<name>:<version> in letters, digits and underscores. Where it is goes to data_dir."
        )


def check_classes(name: str, data_dir: str) -> None:
    """Raises SetupError if a features.json names a class that is not of tfds.

    tfds would import its module, whatever that is: a data set from elsewhere could run code.
    """
    place, _ = naming.parse_builder_name_kwargs(name)  # which tfds may spell in another way
    for root in file_utils.list_data_dirs(data_dir or None):
        directory = epath.Path(root) / str(place)
        if not directory.is_dir():
            continue
        # Of all configs: tfds takes one that the data set names, where the name has none.
        for path in _features(directory, depth=2):
            try:
                found = list(_named(json.loads(path.read_text())))
            except (OSError, ValueError, RecursionError) as error:
                raise SetupError(
                    f"{path} cannot be read: {first_line(error)}. Prepare the data set again."
                ) from None
            foreign = [x for x in found if not x.startswith("tensorflow_datasets.")]
            if foreign:
                raise SetupError(
                    f"{path} names the class {foreign[0]!r}, which is not of tensorflow_datasets: "
                    f"opening it would run code of another module. Only features of tfds are read."
                )


def _features(directory: epath.Path, depth: int) -> Iterator[epath.Path]:
    """The features.json of each directory below; a pattern would pass over [ and hidden ones."""
    for path in directory.iterdir() if depth else ():
        if path.is_dir():
            if (path / FEATURES).exists():
                yield path / FEATURES
            yield from _features(path, depth - 1)


def _named(values: Any) -> Iterator[str]:
    """The classes that a features.json names."""
    if isinstance(values, dict):
        yield from (str(values[key]) for key in CLASS_KEYS if isinstance(values.get(key), str))
    for inner in values.values() if isinstance(values, dict) else values:
        if isinstance(inner, dict | list):
            yield from _named(inner)


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].strip(". ")[:300]
