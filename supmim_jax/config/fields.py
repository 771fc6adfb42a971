"""What every section of the schema is made with: ranges of numbers, and the errors."""

from dataclasses import field

INF = float("inf")


class SetupError(Exception):
    """Something the person who launched the run can fix; commands print it and exit with 2."""


class ConfigError(SetupError):
    """A config value that cannot be used; the message names its path and the alternatives."""


def within(default, low, high):
    """A number field that must lie in [low, high]; of a tuple, each entry."""
    return field(default=default, metadata={"range": (low, high)})
