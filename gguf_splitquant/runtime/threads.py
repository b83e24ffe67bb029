"""How many threads a CPU-bound matrix product should use here.

Hyper-threads share the vector units, and efficiency cores make performance cores wait at every barrier, so
llama.cpp is fastest with one thread per performance core. Small machines are the exception: with two logical
processors there is nothing to choose, and both are used.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

_CPU_ROOT = Path("/sys/devices")


def default_threads() -> int:
    """One thread per performance core that this process may use; all processors if there are only two."""
    allowed = _allowed_processors()
    if len(allowed) <= 2:
        return max(1, len(allowed))
    if platform.system() == "Darwin":
        return min(len(allowed), _performance_cores_macos() or len(allowed))
    return physical_cores(allowed, _CPU_ROOT)


def physical_cores(allowed: frozenset[int], root: Path) -> int:
    """Performance cores among the logical processors ``allowed``, as Linux tells under ``root``.

    Args:
        allowed: logical processors that may be used.
        root: ``/sys/devices``, or a copy of it.

    Returns:
        The number of distinct cores; efficiency cores count only where there are no others. Where the
        kernel tells nothing (containers, other systems), the number of logical processors.
    """
    # On hybrid Intel processors the kernel lists the performance cores' processors here.
    performance = _read_list(root / "cpu_core" / "cpus") & allowed
    candidates = performance or allowed
    cores = set()
    for processor in candidates:
        topology = root / "system" / "cpu" / f"cpu{processor}" / "topology"
        siblings = _read_list(topology / "core_cpus_list") or _read_list(topology / "thread_siblings_list")
        cores.add(min(siblings, default=processor))
    return max(1, len(cores))


def _allowed_processors() -> frozenset[int]:
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def _read_list(path: Path) -> frozenset[int]:
    """A kernel list such as ``0-3,8``; empty if the file is not there or says something else."""
    try:
        text = path.read_text(encoding="ascii").strip()
        numbers: set[int] = set()
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            numbers.update(range(int(first), int(last or first) + 1))
    except (OSError, ValueError):
        return frozenset()
    return frozenset(numbers)


def _performance_cores_macos() -> int:
    try:
        answer = subprocess.run(
            ["sysctl", "-n", "hw.perflevel0.physicalcpu"], capture_output=True, text=True, check=True
        )
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return 0
