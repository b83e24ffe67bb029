"""What the system says about memory, read from its own files."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_splitquant import memory


def test_resident_memory_grows_with_what_is_written() -> None:
    before = memory.resident_bytes()
    held = bytearray(b"x" * (64 << 20))
    assert memory.resident_bytes() - before > len(held) // 2


def test_there_is_less_available_than_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    system = tmp_path / "meminfo"
    system.write_text("MemTotal:       2000 kB\nMemFree:         100 kB\nMemAvailable:   1000 kB\n")
    monkeypatch.setattr(memory, "_SYSTEM", system)
    monkeypatch.setattr(memory, "_GROUP", tmp_path / "none")
    assert memory.available_bytes() == 1000 * 1024


@pytest.mark.parametrize(
    ("most", "used", "expected"),
    [("500000", "200000", 300_000), ("max", "200000", 1000 * 1024), ("100", "200", 0)],
)
def test_the_limit_of_a_container_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, most: str, used: str, expected: int
) -> None:
    system = tmp_path / "meminfo"
    system.write_text("MemAvailable:   1000 kB\n")
    (tmp_path / "memory.max").write_text(f"{most}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(memory, "_SYSTEM", system)
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    assert memory.available_bytes() == expected


def test_without_a_word_from_the_system_it_is_half_of_all(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(memory, "_SYSTEM", tmp_path / "none")
    monkeypatch.setattr(memory.os, "sysconf", {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert memory.available_bytes() == 2_048_000
