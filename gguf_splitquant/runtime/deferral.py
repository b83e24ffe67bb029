"""Ctrl-C while C code calls back into Python.

A signal handler that raises inside a callback raises into C, where the exception is dropped and the program
goes on as if nothing had happened. So the signal waits until the call has returned.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DeferredSignals:
    """A context in which SIGINT and SIGTERM are noted; leaving it delivers them.

    Only handlers written in Python are put off; other threads than the main one get no signals.

    Attributes:
        pending: the signal that has come; None so far.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        self.pending = None
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):
                    self._handlers[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handlers:
            number, handler = self._handlers.popitem()
            signal.signal(number, handler)
        if self.pending is not None:
            signal.raise_signal(self.pending)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.pending = number
