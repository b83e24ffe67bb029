"""The next item is made meanwhile: same items, same order, and errors when their turn comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from gguf_splitquant.lookahead import one_ahead


def test_the_items_are_the_same() -> None:
    assert list(one_ahead(iter([3, 0, None, 7]))) == [3, 0, None, 7]
    assert list(one_ahead(iter([]))) == []


def test_the_next_item_is_made_while_the_present_one_is_worked_on() -> None:
    made = [threading.Event() for _ in range(3)]

    def items() -> Iterator[int]:
        for i, event in enumerate(made):
            event.set()
            yield i

    for i in one_ahead(items()):
        if i + 1 < len(made):
            assert made[i + 1].wait(5)
        if i + 2 < len(made):
            assert not made[i + 2].is_set()


def test_an_error_comes_when_its_turn_does() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no more")

    seen = []
    with pytest.raises(OSError, match="no more"):
        for item in one_ahead(items()):
            seen.append(item)
    assert seen == [1]


def test_an_iteration_that_is_given_up_leaves_no_thread() -> None:
    before = threading.active_count()
    ahead = one_ahead(iter(range(100)))
    assert next(ahead) == 0
    ahead.close()
    assert threading.active_count() == before
