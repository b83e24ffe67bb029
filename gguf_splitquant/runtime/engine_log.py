"""llama.cpp's own log, kept instead of printed.

The library reports why it refused a model only in its log, which by default goes to stderr. Around every
call that can fail the log is redirected here, so that a success is silent and a failure can be explained.
"""

from __future__ import annotations

import ctypes
import re
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_WARN, _ERROR, _CONTINUED = 3, 4, 5
"""``enum ggml_log_level`` (ggml.h)."""

_FUNCTION = re.compile(r"^(\w+: )+")
"""Names of llama.cpp's functions before a message, which tell a user nothing."""


class EngineLog:
    """The last lines that llama.cpp logged, with their levels."""

    def __init__(self, keep: int = 200) -> None:
        self._lines: deque[tuple[int, str]] = deque(maxlen=keep)
        self._level = 0

    def add(self, level: int, text: str) -> None:
        """One message of the log callback. Level 5 continues the message before."""
        if level == _CONTINUED and self._lines:
            last_level, last = self._lines.pop()
            self._lines.append((last_level, last + text))
        else:
            self._lines.append((level, text))

    def clear(self) -> None:
        """Forget all lines."""
        self._lines.clear()

    def reason(self) -> str:
        """The line that explains a failure best: of the errors, else of the warnings, the last one that says
        more than that loading failed. Empty if there is none."""
        for wanted in (_ERROR, _WARN):
            lines = [text.strip() for level, text in self._lines if level == wanted and text.strip()]
            telling = [line for line in lines if "failed to load model" not in line]
            if lines:
                line = (telling or lines)[-1].replace("error loading model: ", "")
                return _FUNCTION.sub("", line)
        return ""


@contextmanager
def captured(llama_cpp: Any, log: EngineLog) -> Iterator[None]:
    """While this is open, llama.cpp logs into ``log``; then the former callback is back. Not thread-safe:
    the library has one callback for the whole process."""
    former = llama_cpp.llama_log_callback()
    former_data = ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(former), ctypes.byref(former_data))

    def receive(level: int, text: bytes, _user_data: Any) -> None:
        log.add(level, (text or b"").decode("utf-8", "replace"))

    # a local name keeps the C callback alive until it is replaced
    callback = llama_cpp.llama_log_callback(receive)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        yield
    finally:
        llama_cpp.llama_log_set(former, former_data)
