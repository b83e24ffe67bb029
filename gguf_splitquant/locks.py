"""One process at a time, on this machine and on others that share the folder.

The kernel gives a lock back when its process ends, however it ends: a killed run never blocks the next one.
"""

from __future__ import annotations

import errno
import os
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems answer that have no locks (Lustre without ``flock``, some network drives)."""


def open_locked(path: Path) -> FileIO | None:
    """Open a file for reading and writing, created if it is missing, for this process alone.

    The lock goes with the file: closing it gives it back. A file system without locks gives none, and no
    error: what is written under a lock here has the same bytes whoever writes it.

    Args:
        path: the file. It may be deleted by whoever holds the lock.

    Returns:
        The file, unbuffered; None if another process has it.

    Raises:
        OSError: the file cannot be opened.
    """
    return _open_locked(path, wait=False)


def wait_for_lock(path: Path) -> FileIO:
    """:func:`open_locked`, waiting for another process to end its work."""
    file = _open_locked(path, wait=True)
    assert file is not None
    return file


def _open_locked(path: Path, *, wait: bool) -> FileIO | None:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)  # a link could lead anywhere
    while True:
        file = FileIO(os.open(path, flags, 0o666), "r+")
        try:
            if not _lock(file, wait):
                file.close()
                return None
            # the last holder may have deleted it between opening and locking
            if _same_file(file, path):
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: FileIO, wait: bool) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _same_file(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
