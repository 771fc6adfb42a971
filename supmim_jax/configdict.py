"""The one door between ml_collections and the schema of `config.py`.

A config file returns `to_configdict(Config(...))` (or a ProbeConfig); a command calls
`from_configdict` once, and nothing below it ever sees a ConfigDict.
"""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from supmim_jax.config import INF, Config, ConfigError, ProbeConfig

Kind = TypeVar("Kind", Config, ProbeConfig)


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
        raise ConfigError(f"{path} is {values!r}, but it is a section ({kind.__name__}).")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in values:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean {path}.{close[0]}?" if close else ""
            raise ConfigError(f"{path}.{key} does not exist.{hint} Known: {', '.join(fields)}.")
    hints = typing.get_type_hints(kind)
    checked = {k: _value(hints[k], fields[k], v, f"{path}.{k}") for k, v in values.items()}
    try:
        return kind(**checked)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _value(hint: Any, spec: dataclasses.Field, value: Any, path: str):
    if isinstance(hint, types.UnionType):
        hint = _member(typing.get_args(hint), value, path)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if typing.get_origin(hint) is Literal:
        options = typing.get_args(hint)
        if value not in options or isinstance(value, bool):
            raise ConfigError(f"{path} is {value!r}; known are {', '.join(map(repr, options))}.")
        return value
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise ConfigError(f"{path} is {value!r}; it must be a tuple of one or more entries.")
        entry = typing.get_args(hint)[0]
        return tuple(_value(entry, spec, v, f"{path}[{i}]") for i, v in enumerate(value))
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ConfigError(
            f"{path} is {value!r} of type {type(value).__name__}; it must be {hint.__name__}."
        )
    low, high = spec.metadata.get("range", (None, None))
    if low is not None and not low <= value <= high:
        top = "or more" if high == INF else f"to {high}"
        raise ConfigError(f"{path} is {value}; it must be {low} {top}.")
    return value


def _member(kinds: tuple[type, ...], value: Any, path: str) -> type:
    """The dataclass of a union whose `name` the section carries."""
    by_name = {kind.__dataclass_fields__["name"].default: kind for kind in kinds}
    name = value.get("name") if isinstance(value, dict) else value
    if name not in by_name:
        raise ConfigError(f"{path}.name is {name!r}; known are {', '.join(map(repr, by_name))}.")
    return by_name[name]
