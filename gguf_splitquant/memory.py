"""How much memory this process has, and how much there is to be had."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from pathlib import Path

_STATUS, _SYSTEM = Path("/proc/self/status"), Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def resident_bytes() -> int:
    """Memory of this process that is resident now; where the system does not tell, the most so far."""
    known = _field(_STATUS, "VmRSS")
    if known is not None:
        return known
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def available_bytes() -> int:
    """Memory that can be taken without driving others out, also inside a container with a limit.

    Half of all memory where the system does not tell how much of it is in use.
    """
    known = _field(_SYSTEM, "MemAvailable")
    if known is None:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    try:
        # version 2 of control groups; what a container sees as its root
        most, used = (int((_GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):
        return known
    return max(0, min(known, most - used))


def give_back() -> None:
    """Return freed memory to the system, where the C library keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def _field(path: Path, name: str) -> int | None:
    """Bytes that a line ``name: N kB`` of a file of the kernel tells."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)
