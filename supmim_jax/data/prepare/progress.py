"""What the command says while it works, on stderr."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

LOG_EVERY = 30.0  # seconds between lines where stderr is a file

Item = TypeVar("Item")


class Lines:
    """stderr of a log file: each state of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(text.strip() + "\n")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def bar(what: str, total: int, unit: str) -> Iterator[tqdm]:
    """A bar of one line on a terminal, a line every LOG_EVERY seconds in a log file."""
    terminal = sys.stderr.isatty()
    shown = tqdm(
        desc=what,
        total=total,
        unit=f" {unit}",
        unit_scale=unit == "B",
        file=sys.stderr if terminal else Lines(),
        mininterval=0.2 if terminal else LOG_EVERY,
        ncols=None if terminal else 80,
        ascii=not terminal,
    )
    with shown:
        yield shown


def counted(items: Iterable[Item], shown: tqdm) -> Iterator[Item]:
    """Passes the items on and counts them."""
    for item in items:
        yield item
        shown.update()


def size(count: int) -> str:
    """Bytes as one reads them."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
