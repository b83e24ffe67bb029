"""Writing a file so that it is either complete or not there.

Everything goes to ``OUT.gguf.partial`` beside the target where a journal can say what of it is complete, and
to ``OUT.gguf.XXXXXXXX.partial``, a name of this run's own, where none is kept. Only a complete file gets the
target's name.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
from io import FileIO
from pathlib import Path

from ..errors import OutputError

_LONGEST = 240
"""Of a name, in bytes: most file systems take 255."""


class PartialFile:
    """A file of known size, written at any positions by any threads, then renamed into place.

    It begins to exist with :meth:`create` or :meth:`reopen` and ends with :meth:`commit`, :meth:`discard`, or
    :meth:`close`, which leaves it as it is.

    Args:
        path: the target.
        total_bytes: its final size.
        resumable: a journal is kept: an interrupted run can go on.
    """

    def __init__(self, path: Path, total_bytes: int, *, resumable: bool = False) -> None:
        self.path = path
        self._total = total_bytes
        self._resumable = resumable
        self._partial = beside(path, "partial" if resumable else f"{secrets.token_hex(4)}.partial")
        self._file: FileIO | None = None

    def create(self, *, force: bool = False) -> None:
        """Begin with an empty file.

        Args:
            force: of a resumable one, replace what an earlier run left.

        Raises:
            OutputError: its folder is read-only, or the disk refuses.
        """
        try:
            if force and self._resumable:
                self._partial.unlink(missing_ok=True)
            # unbuffered: slabs are large, and an error must surface in the write that caused it
            self._file = FileIO(self._partial, "x+")
        except FileExistsError as error:
            fix = "move it away, or pass --force to replace it"
            raise OutputError(self._partial, "exists, and no journal belongs to it", fix) from error
        except OSError as error:
            raise self._failure(error) from error
        try:
            self._file.truncate(self._total)
        except OSError as error:
            self.discard()
            raise self._failure(error) from error

    def reopen(self) -> None:
        """Go on with what an earlier run left. Raises OutputError if it is gone or has another size."""
        try:
            flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
            self._file = FileIO(os.open(self._partial, flags), "r+")
            size = os.fstat(self._file.fileno()).st_size
        except FileNotFoundError as error:
            fix = "pass --force without --resume to start again"
            raise OutputError(self._partial, "is gone, though its journal is there", fix) from error
        except OSError as error:
            raise self._failure(error) from error
        if size != self._total:
            self.close()
            cause = f"has {size:,} bytes and not {self._total:,}, as its journal says"
            raise OutputError(self._partial, cause, "pass --force without --resume to start again")

    @property
    def in_place(self) -> bool:
        """An earlier run has renamed it already: the target is there and the partial file is not."""
        return not self._partial.exists() and self.path.is_file() and self.path.stat().st_size == self._total

    @property
    def missing_bytes(self) -> int:
        """What the disk has not yet given to it."""
        try:
            status = self._partial.stat()
        except OSError:
            return self._total
        return max(0, self._total - 512 * getattr(status, "st_blocks", 0))

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` at an absolute position. Thread-safe. Raises OutputError when the disk refuses."""
        view = memoryview(data).cast("B")
        descriptor = self._opened().fileno()
        try:
            # without a position of its own: threads write at once
            while view:
                written = os.pwrite(descriptor, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise self._failure(error) from error

    def sync(self) -> None:
        """Bring to disk what was written. Raises OutputError when the disk refuses."""
        try:
            os.fsync(self._opened().fileno())
        except OSError as error:
            raise self._failure(error) from error

    def commit(self) -> None:
        """Its data is on disk (:meth:`sync`): give it its name."""
        self.close()
        try:
            self._partial.replace(self.path)
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Leave it as it is."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def discard(self) -> None:
        """Remove it."""
        self.close()
        self._partial.unlink(missing_ok=True)

    def _opened(self) -> FileIO:
        if self._file is None:
            raise AssertionError(f"{self._partial} is not open")
        return self._file

    def _failure(self, error: OSError) -> OutputError:
        return write_failure(self.path, error, resumable=self._resumable)


def write_failure(path: Path, error: OSError, *, resumable: bool = False) -> OutputError:
    """What a user should know when the disk refuses.

    Args:
        path: of the file.
        error: of the system.
        resumable: what is complete stays, for ``--resume``.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        again = "free some space, then run the same command with --resume: what is complete is kept"
        fix = again if resumable else "free some space or write to another disk"
        return OutputError(path, "the disk is full", fix)
    return OutputError(path, f"cannot be written: {error.strerror or error}", "choose a writable folder")


def beside(path: Path, ending: str) -> Path:
    """``path`` with a further ending, in the same folder; names that would be too long are abridged."""
    name = f"{path.name}.{ending}"
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{path.name[:50]}.{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]}.{ending}"
    return path.with_name(name)


def free_bytes(folder: Path) -> int:
    """What the disk of a folder has left for this user."""
    return shutil.disk_usage(folder).free


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
    free = free_bytes(folder)
    if free < total_bytes:
        raise OutputError(
            path,
            f"the file will have {total_bytes:,} bytes and the disk has {free:,} left",
            "free some space or write to another disk",
        )
