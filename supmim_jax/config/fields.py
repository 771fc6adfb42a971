"""How the fields of the schema are declared: ranges of numbers, and paths."""

from dataclasses import field

INF = float("inf")
# What the device's int32 and float32 hold.
LARGEST = {int: 2**31 - 1, float: 3.4e38}
SMALLEST = 1.2e-38


def path_field():
    """A text field with a path, "" for none; configdict makes it absolute (storage.location)."""
    return field(default="", metadata={"path": True})


def within(default, low, high):
    """A number field that must lie in [low, high]; of a tuple, each entry.

    Where `high` is INF, only LARGEST bounds it: no field may be infinite.
    """
    return field(default=default, metadata={"range": (low, high)})
