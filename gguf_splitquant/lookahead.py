"""Reading while computing: the next item of an iterator is made by another thread."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The same items; the next one is made while the present one is worked on.

    What making an item raises is raised when its turn comes. An iteration that is given up waits for the item
    that is being made.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        coming = thread.submit(_next, items)
        while item := coming.result():
            coming = thread.submit(_next, items)
            yield item[0]


def _next(items: Iterator[T]) -> tuple[T] | None:
    for item in items:
        return (item,)
    return None
