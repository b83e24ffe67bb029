"""A polite request to end (SIGTERM, of a scheduler or a service manager) unwinds like Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(BaseException):
    """SIGTERM has arrived."""


@contextmanager
def termination_raises() -> Iterator[None]:
    """Raise :class:`Terminated` in the main thread on SIGTERM, as long as the context lasts.

    Other threads than the main one cannot ask for that, and whoever has a handler keeps it.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
