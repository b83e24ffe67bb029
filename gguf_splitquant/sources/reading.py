"""A file that is read at any position by any number of threads, and never mapped.

Mapped pages count as resident; a model larger than memory would then look (and on some systems behave) as if
it were loaded. Here bytes are read with ``pread`` into a buffer of exactly that size.
"""

from __future__ import annotations

import os
import weakref
from pathlib import Path

from ..bounded import open_descriptor
from ..errors import CheckpointError

DOWNLOAD_AGAIN = "download the file again"


class PositionedFile:
    """An open file.

    Args:
        path: the file; opened once, closed by :meth:`close` or when the last reference is gone.

    Raises:
        CheckpointError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._descriptor = open_descriptor(path)
        except OSError as error:
            raise CheckpointError(path, f"cannot be opened ({error.strerror})", DOWNLOAD_AGAIN) from error
        self._close = weakref.finalize(self, os.close, self._descriptor)

    @property
    def size(self) -> int:
        """Bytes of the file, now."""
        return os.fstat(self._descriptor).st_size

    def close(self) -> None:
        """Close the file; its tensors can no longer be read. Twice does no harm."""
        self._close()

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from byte ``offset`` of the file on. Thread-safe.

        Raises:
            CheckpointError: the file ends early, or reading fails.
        """
        if not self._close.alive:
            raise ValueError(f"{self.path} is closed")
        while buffer:
            try:
                n = os.preadv(self._descriptor, [buffer], offset)
            except OSError as error:
                raise CheckpointError(
                    self.path, f"reading failed ({error.strerror})", DOWNLOAD_AGAIN
                ) from error
            if n == 0:
                cause = f"ends {len(buffer)} bytes early: it changed while it was read"
                raise CheckpointError(self.path, cause, DOWNLOAD_AGAIN)
            buffer, offset = buffer[n:], offset + n
