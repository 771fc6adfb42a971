"""Items made ahead by a thread."""

import gc
import itertools
import threading
import time

import pytest

from supmim_jax.data.loader import Prefetch


def counted(log):
    for i in itertools.count():
        log.append(i)
        yield i


def settled(log, length):
    """The log a while after it has that length, so that a thread that went on would be seen."""
    deadline = time.monotonic() + 20
    while len(log) < length and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    return list(log)


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_all_items_come_in_order_and_then_the_end():
    items = Prefetch(iter(range(100)), 2)
    assert list(items) == list(range(100))
    assert list(items) == []
    items.close()


def test_no_more_are_made_than_wait_and_one_and_closing_ends_them():
    log, before = [], len(threads())
    items = Prefetch(counted(log), 2)
    assert settled(log, 3) == [0, 1, 2] and len(threads()) == before + 1
    assert next(items) == 0
    assert settled(log, 4) == [0, 1, 2, 3]
    items.close()
    assert len(threads()) == before and len(log) == 4
    assert next(items, "end") == "end"
    items.close()


def test_an_exception_comes_in_its_place_and_again():
    def broken():
        yield 1
        yield 2
        raise ValueError("the third")

    items = Prefetch(broken(), 2)
    assert (next(items), next(items)) == (1, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match="the third"):
            next(items)
    items.close()


def test_a_thread_ends_when_nobody_holds_its_items_any_more():
    log, before = [], len(threads())
    items = Prefetch(counted(log), 2)
    settled(log, 3)
    del items
    gc.collect()
    deadline = time.monotonic() + 20
    while len(threads()) > before:
        assert time.monotonic() < deadline, "the thread is still there"
        time.sleep(0.05)
