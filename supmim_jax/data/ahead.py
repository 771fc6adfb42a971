"""The next items are made by a thread while one is used."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Ahead(Iterator[Item], Generic[Item]):
    """`items`, of which up to `most` wait made; an exception comes at its item's place.

    Taking an item that is ready does not block, so the thread gets no turn at that moment; it makes
    the next item as soon as the consumer gives up Python's lock.
    """

    def __init__(self, items: Iterator[Item], most: int):
        self.made, self.closed = queue.Queue(most), threading.Event()
        self.error: BaseException | None = None
        self.thread = threading.Thread(
            target=_make, args=(items, self.made, self.closed), name="ahead", daemon=True
        )
        weakref.finalize(self, _end, self.made, self.closed)
        self.thread.start()

    def __next__(self) -> Item:
        if self.error is None:
            item, self.error = self.made.get()
            if self.error is None:
                return item
        raise self.error

    def close(self) -> None:
        """Ends the thread; an item that it has begun is made and dropped. May be repeated."""
        self.error = self.error or StopIteration()
        _end(self.made, self.closed)
        self.thread.join()


def _make(items: Iterator[Item], made: queue.Queue, closed: threading.Event) -> None:
    error = None
    while error is None and not closed.is_set():
        item = None  # or the last one would be kept while the next is made
        try:
            item = next(items)
        except BaseException as found:  # StopIteration too
            error = found
        made.put((item, error))


def _end(made: queue.Queue, closed: threading.Event) -> None:
    closed.set()
    while not made.empty():  # a thread that waits for room goes on
        made.get()
