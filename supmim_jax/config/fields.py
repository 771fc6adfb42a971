"""What every section of the schema is made with: ranges of numbers, and the errors."""

from dataclasses import field

INF = float("inf")
# What the device's int32 and float32 hold.
LARGEST = {int: 2**31 - 1, float: 3.4e38}
SMALLEST = 1.2e-38


class SetupError(Exception):
    """Something the person who launched the run can fix; commands print it and exit with 2."""


class ConfigError(SetupError):
    """A config value that cannot be used; the message names its path and the alternatives."""


def within(default, low, high):
    """A number field that must lie in [low, high]; of a tuple, each entry.

    Where `high` is INF, only LARGEST bounds it: no field may be infinite.
    """
    return field(default=default, metadata={"range": (low, high)})
