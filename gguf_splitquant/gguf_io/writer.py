"""Writing a file so that it is either complete or not there.

Everything goes to ``OUT.XXXXXXXX.partial`` beside the target, a name of this run's own; only a complete file
gets the target's name. Any failure removes the partial file.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
import threading
from pathlib import Path
from types import TracebackType

from ..errors import OutputError


class PartialFile:
    """A file of known size, written at any positions by any threads, then renamed into place.

    Use as a context manager: leaving it without :meth:`commit` removes the partial file.

    Args:
        path: the target.
        total_bytes: its final size.
        force: replace an existing target.

    Raises:
        OutputError: the target exists (without ``force``) or is a folder, its folder is missing or
            read-only, or the disk has less than ``total_bytes`` left.
    """

    def __init__(self, path: Path, total_bytes: int, *, force: bool = False) -> None:
        check_target(path, total_bytes, force=force)
        self.path = path
        self._partial = path.with_name(f"{path.name[:100]}.{secrets.token_hex(4)}.partial")
        self._lock = threading.Lock()
        self._committed = False
        try:
            # unbuffered: slabs are large, and an error must surface in the write that caused it
            self._file = self._partial.open("xb", buffering=0)
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._file.truncate(total_bytes)
        except OSError as error:
            self._file.close()
            self._partial.unlink()
            raise self._failure(error) from error

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._file.closed:
            self._file.close()
        if not self._committed:
            self._partial.unlink(missing_ok=True)

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` at an absolute position. Thread-safe. Raises OutputError when the disk refuses."""
        view = memoryview(data).cast("B")
        try:
            with self._lock:
                self._file.seek(offset)
                while view:
                    view = view[self._file.write(view) :]
        except OSError as error:
            raise self._failure(error) from error

    def commit(self) -> None:
        """The file is complete: flush it to disk and give it its name."""
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
        except OSError as error:
            raise self._failure(error) from error
        self._committed = True

    def _failure(self, error: OSError) -> OutputError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutputError(self.path, "the disk is full", "free some space or write to another disk")
        return OutputError(
            self.path, f"cannot be written: {error.strerror or error}", "choose a writable folder"
        )


def check_target(path: Path, total_bytes: int, *, force: bool) -> None:
    """Raise OutputError if ``path`` cannot become a file of ``total_bytes``; touches nothing."""
    folder = path.parent
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        mode = None
    except OSError as error:
        raise OutputError(path, error.strerror or str(error), "choose another name") from error
    if path.is_dir():
        raise OutputError(path, "is a folder", "name the GGUF file to write")
    if mode is not None and not force:
        raise OutputError(path, "exists", "pass --force to replace it")
    if mode is not None and not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        raise OutputError(path, "is a device or another special file", "name the GGUF file to write")
    if not folder.is_dir():
        raise OutputError(path, f"the folder {folder} does not exist", "create it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(path, f"the folder {folder} is not writable", "choose another folder")
    free = shutil.disk_usage(folder).free
    if free < total_bytes:
        raise OutputError(
            path,
            f"the file will have {total_bytes:,} bytes and the disk has {free:,} left",
            "free some space or write to another disk",
        )
