"""What every section of the schema is made with: ranges of numbers, and the errors."""

import errno
from dataclasses import field

INF = float("inf")
# System errors that come again until somebody changes something: a full disk, a quota, rights, a
# read-only file system, a limit to open files. Others may be gone the next time.
_AGAIN = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EMFILE")
OF_THE_USER = tuple(getattr(errno, name) for name in _AGAIN)
# What the device's int32 and float32 hold.
LARGEST = {int: 2**31 - 1, float: 3.4e38}
SMALLEST = 1.2e-38


class SetupError(Exception):
    """Something the person who launched the run can fix; commands print it and exit with 2."""


class ConfigError(SetupError):
    """A config value that cannot be used; the message names its path and the alternatives."""


def path_field():
    """A text field with a path, "" for none; configdict makes it absolute (storage.location)."""
    return field(default="", metadata={"path": True})


def within(default, low, high):
    """A number field that must lie in [low, high]; of a tuple, each entry.

    Where `high` is INF, only LARGEST bounds it: no field may be infinite.
    """
    return field(default=default, metadata={"range": (low, high)})
