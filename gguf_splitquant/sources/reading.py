"""A file that is read at any position by any number of threads.

Mapped pages count as resident; a model larger than memory would then look (and on some systems behave) as if
it were loaded. So bytes are read with ``pread`` into a buffer of exactly that size. Pages are for llama.cpp
alone, which computes with weights where they lie (:meth:`PositionedFile.map`).
"""

from __future__ import annotations

import mmap
import os
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    def map(self) -> mmap.mmap:
        """The whole file as pages that cannot be written. Raises CheckpointError if the system refuses."""
        try:
            return mmap.mmap(self._descriptor, 0, prot=mmap.PROT_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(self.path, f"cannot be mapped ({error})", DOWNLOAD_AGAIN) from error


@dataclass(frozen=True)
class StoredRows:
    """Reads rows of a tensor that lies in a file as it is; called with the first row and the one behind the
    last.

    Attributes:
        file: stays open as long as it is referenced.
        offset: of the first byte.
        shape: of the tensor, at least one axis.
        dtype: of the values.
    """

    file: PositionedFile
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __call__(self, start: int, stop: int) -> NDArray[Any]:
        """Shape ``(stop - start, *shape[1:])``. Thread-safe.

        Raises:
            CheckpointError: the file ends early or cannot be read.
        """
        if not self.shape or not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"{self.file.path}: rows {start} to {stop} of {list(self.shape)}")
        rows = np.empty((stop - start, *self.shape[1:]), self.dtype)
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * rows.itemsize
        self.file.read_into(rows.reshape(-1).view(np.uint8).data, self.offset + start * row_bytes)
        return rows
