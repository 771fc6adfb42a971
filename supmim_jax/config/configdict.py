"""The one door between ml_collections and the schema of an experiment.

A config file returns `to_configdict(Config(...))` (or a ProbeConfig); a command calls
`from_configdict` once, and nothing below it ever sees a ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
import unicodedata
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from supmim_jax import storage
from supmim_jax.config import Config, ProbeConfig
from supmim_jax.config.fields import LARGEST, SMALLEST
from supmim_jax.errors import ConfigError, SetupError

Kind = TypeVar("Kind", Config, ProbeConfig)
LONGEST = 1000  # characters of a text
SHOWN = 120  # characters of a wrong value that a message repeats
UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, half characters, ends of lines


def to_configdict(config: Config | ProbeConfig) -> ConfigDict:
    """The checked ConfigDict of a whole config, locked: new keys and changed types are refused.

    Raises:
      ConfigError: as `from_configdict`.
    """
    checked = _build(type(config), dataclasses.asdict(config), "config")  # also makes 300 a float
    return ConfigDict(dataclasses.asdict(checked)).lock()


def from_configdict(config: ConfigDict | dict, kind: type[Kind] = Config) -> Kind:
    """The checked config. A missing key takes its default, so that older saved configs load.

    Raises:
      ConfigError: an unknown key, a value of the wrong type or out of range; the
        message names the path, what was found and what would be accepted.
    """
    return _build(kind, config.to_dict() if isinstance(config, ConfigDict) else config, "config")


def section(values: Any) -> dict:
    """A section of the schema as nested plain values."""
    return dataclasses.asdict(values)


def differences(a: dict, b: dict, path: str = "config") -> list[str]:
    """What differs between two configs as nested dicts: "config.seed: 0; 1" and so on."""
    found = []
    for key in sorted(set(a) | set(b)):
        x, y, where = a.get(key), b.get(key), f"{path}.{key}"
        if isinstance(x, dict) and isinstance(y, dict):
            found += differences(x, y, where)
        elif x != y:
            found.append(f"{where}: {x!r}; {y!r}")
    return found


def _build(kind: type, values: Any, path: str):
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is {_shown(values)}, but it is a section ({kind.__name__}).")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(str(key)[:SHOWN], fields, n=1)
            hint = f" Did you mean {path}.{close[0]}?" if close else ""
            name = key if isinstance(key, str) and key.isidentifier() else _shown(key)
            raise ConfigError(
                f"{path}.{name[:SHOWN]} does not exist.{hint} Known: {', '.join(fields)}."
            )
    hints = typing.get_type_hints(kind)
    checked = {k: _value(hints[k], fields[k], v, f"{path}.{k}") for k, v in values.items()}
    try:
        return kind(**checked)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _value(hint: Any, spec: dataclasses.Field, value: Any, path: str):
    if isinstance(hint, types.UnionType):
        kinds = typing.get_args(hint)
        hint = _member(kinds, value, path)
        others = [kind for kind in kinds if value.keys() <= kind.__dataclass_fields__.keys()]
        if others and hint not in others:
            given = others[0].__dataclass_fields__["name"].default
            raise ConfigError(
                f"{path}.name is {_shown(value['name'])}, but the other fields are those of "
                f"{given!r}: to override the name does not change them. Take a config file with "
                f"{_shown(value['name'])}."
            )
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if not any(type(value) is type(option) and value == option for option in options):
            known = ", ".join(map(repr, options))
            raise ConfigError(f"{path} is {_shown(value)}; known are {known}.")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise ConfigError(
                f"{path} is {_shown(value)}; it must be a tuple of one or more entries."
            )
        entry = typing.get_args(hint)[0]
        return tuple(_value(entry, spec, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int and abs(value) < LARGEST[float]:
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(
            f"{path} is {_shown(value)} of type {type(value).__name__}; it must be {hint.__name__}."
        )
    if hint is str:
        return _text(value, path, spec.metadata.get("path", False))
    low, high = spec.metadata.get("range", (None, None))
    if low is not None and not low <= value <= min(high, LARGEST[hint]):
        top = "or more" if high > LARGEST[hint] >= value else f"to {min(high, LARGEST[hint])}"
        raise ConfigError(f"{path} is {_shown(value)}; it must be {low} {top}.")
    if hint is float and 0 < abs(value) < SMALLEST:
        raise ConfigError(f"{path} is {value}; a float32 holds 0, or {SMALLEST} and more.")
    return value


def _text(value: str, path: str, is_place: bool) -> str:
    """The text, if it may be a name or a path: none has control characters or ends of lines.

    A place becomes absolute, so that it is the same from every directory.
    """
    if len(value) > LONGEST:
        raise ConfigError(f"{path} has {len(value)} characters; it must have {LONGEST} or less.")
    if any(unicodedata.category(c) in UNPRINTABLE for c in value):
        raise ConfigError(
            f"{path} is {_shown(value)}, which has control characters or is not Unicode; it must "
            f"be one line of text."
        )
    try:
        return str(storage.location(value)) if value and is_place else value
    except SetupError as error:
        raise ConfigError(f"{path}: {error}") from None


def _member(kinds: tuple[type, ...], value: Any, path: str) -> type:
    """The dataclass of a union whose `name` the section carries."""
    by_name = {kind.__dataclass_fields__["name"].default: kind for kind in kinds}
    name = value.get("name") if isinstance(value, dict) else value
    if not isinstance(name, str) or name not in by_name:
        known = ", ".join(map(repr, by_name))
        raise ConfigError(f"{path}.name is {_shown(name)}; known are {known}.")
    return by_name[name]


def _shown(value: Any) -> str:
    """A value as a message repeats it: escaped, and not all of a long one."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
