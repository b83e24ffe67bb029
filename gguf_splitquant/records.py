"""Records of what is done, one line of JSON each, that survive the death of their process at any moment.

A line counts once its newline is there: what an interruption left behind the last one is cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from io import FileIO
from types import TracebackType
from typing import Any

from .bounded import MAX_TEXT_BYTES, parse_json


class Records:
    """A file of JSON lines that only grows.

    Args:
        file: open for reading and writing; it belongs to this object from here on.

    Attributes:
        lines: the records that were there.

    Raises:
        ValueError: a line before the last is not JSON, or is nested too deeply; or the file is too long.
        OSError: the file cannot be read.
    """

    def __init__(self, file: FileIO) -> None:
        self._file = file
        size = os.fstat(file.fileno()).st_size
        if size > MAX_TEXT_BYTES:
            raise ValueError(f"has {size:,} bytes, and {MAX_TEXT_BYTES:,} is the most that is read")
        file.seek(0)
        data = file.readall()
        self._end = data.rfind(b"\n") + 1
        self.lines: list[Any] = [parse_json(line) for line in data[: self._end].split(b"\n")[:-1]]

    def append(self, records: Iterable[Any]) -> None:
        """Add records; they are on disk before this returns. Raises OSError, and then none of them counts."""
        data = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in records)
        view = memoryview(data)
        self._file.seek(self._end)
        self._file.truncate()
        try:
            while view:
                view = view[self._file.write(view) :]
            os.fsync(self._file.fileno())
        except OSError:
            self._file.truncate(self._end)
            raise
        self._end += len(data)

    def clear(self) -> None:
        """Forget everything."""
        self.lines, self._end = [], 0
        self._file.truncate(0)

    def close(self) -> None:
        """Close the file, and give back its lock; the records stay."""
        self._file.close()

    def __enter__(self) -> Records:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
