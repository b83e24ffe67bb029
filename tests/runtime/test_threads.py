"""Core counting against the kernel's own layout, rebuilt in a temporary folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gguf_splitquant.runtime.threads import default_threads, physical_cores


def machine(root: Path, siblings: list[str], performance: str = "") -> Path:
    for processor, shared in enumerate(siblings):
        topology = root / "system" / "cpu" / f"cpu{processor}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_cpus_list").write_text(shared + "\n")
    if performance:
        (root / "cpu_core").mkdir()
        (root / "cpu_core" / "cpus").write_text(performance + "\n")
    return root


@pytest.mark.parametrize(
    ("siblings", "performance", "allowed", "cores"),
    [
        (["0", "1", "2", "3"], "", range(4), 4),
        (["0,4", "1,5", "2,6", "3,7"] * 2, "", range(8), 4),
        (["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], "0-3", range(8), 2),
        # only efficiency cores are allowed: they are all there is
        (["0-1", "0-1", "2-3", "2-3", "4", "5", "6", "7"], "0-3", range(4, 8), 4),
        # half of the hyper-threads of a machine
        (["0,4", "1,5", "2,6", "3,7"] * 2, "", (1, 2, 5), 2),
    ],
)
def test_physical_cores(
    tmp_path: Path, siblings: list[str], performance: str, allowed: range | tuple[int, ...], cores: int
) -> None:
    root = machine(tmp_path, siblings, performance)
    assert physical_cores(frozenset(allowed), root) == cores


def test_a_kernel_that_tells_nothing_or_nonsense(tmp_path: Path) -> None:
    assert physical_cores(frozenset(range(6)), tmp_path) == 6
    assert physical_cores(frozenset(range(2)), machine(tmp_path, ["?", "a-b"])) == 2


def test_default_is_within_what_is_allowed() -> None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = default_threads()
    assert 1 <= threads <= allowed
    if allowed <= 2:
        assert threads == allowed
