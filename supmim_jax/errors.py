"""Exceptions for what the person who launched a run can fix; commands print them and exit 2."""

import errno
from collections.abc import Sequence

# System errors that come again until somebody changes something: a full disk, a quota, rights, a
# read-only file system, a limit to open files. Others may be gone the next time.
_AGAIN = ("ENOSPC", "EDQUOT", "EACCES", "EPERM", "EROFS", "ENOTDIR", "EISDIR", "EMFILE")
OF_THE_USER = tuple(getattr(errno, name) for name in _AGAIN)


class SetupError(Exception):
    """Something the person who launched the run can fix; the message says what and how."""


class ConfigError(SetupError):
    """A config value that cannot be used; the message names its path and the alternatives."""


def first_few(items: Sequence[str], separator: str = "; ", most: int = 5) -> str:
    """The first items for a message, and how many more there are."""
    rest = len(items) - most
    return separator.join([*items[:most], *[f"and {rest} more"] * (rest > 0)])
