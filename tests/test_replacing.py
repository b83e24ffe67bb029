"""Small files that appear complete or not at all."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gguf_splitquant.errors import OutputError
from gguf_splitquant.replacing import write_text


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path: Path) -> None:
    path = tmp_path / "digest"

    def write(number: int) -> None:
        for _ in range(200):
            write_text(path, f"{number}\n" * 100)

    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(write, range(4)):
            pass
    assert len(set(path.read_text().split())) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"digest: cannot be written: .*; set the cache elsewhere"):
        write_text(tmp_path / "none" / "digest", "x", "set the cache elsewhere")
    with pytest.raises(OutputError, match="choose another place"):
        write_text(tmp_path / "none" / "digest", "x")
