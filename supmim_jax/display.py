"""What a person sees of a command: a fault of the terminal, pipe or file never ends the work.

The reader of `2>&1 | head` goes away, a terminal hangs up, the disk of a log fills, a shell closes
stderr (2>&-), an encoding lacks a letter. What cannot be shown is left out, and the work goes on.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from supmim_jax.config import OF_THE_USER


class Shown:
    """A stream of text that drops what it cannot write, and remembers the last reason."""

    def __init__(self, stream):
        self.stream, self.fault = stream, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def writelines(self, lines) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, do: Callable, *values) -> None:
        try:
            do(*values)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.fault = error


def guard() -> None:
    """From now on stdout and stderr are Shown.

    Where they are closed, they become /dev/null: the next file that is opened would get their
    number, and be written to by whatever prints.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for number, name in enumerate(("stdout", "stderr"), 1):
        stream = getattr(sys, name) or os.fdopen(number, "w", closefd=False)
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, Shown(stream))


def lost() -> OSError | None:
    """Why what was printed on stdout is not complete; not that its reader went, who had enough."""
    sys.stdout.flush()
    fault = getattr(sys.stdout, "fault", None)
    return fault if isinstance(fault, OSError) and fault.errno in OF_THE_USER else None


def end() -> None:
    """What could not be written is given up, or Python would complain of it as it ends."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        if getattr(stream, "fault", None):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
