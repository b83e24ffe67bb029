"""The table of SHA-256 runs tells equal bytes from others."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import RECIPES
from gguf_splitquant.sources import open_model
from scripts import sha256_runs


def test_equal_runs(stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sha256_runs.run(stories15m, ["plain"]) == 0
    out = tmp_path / "out.gguf"
    convert(open_model(stories15m), out, RECIPES["plain"])
    digest = hashlib.sha256(out.read_bytes()).hexdigest()
    assert capsys.readouterr().out.splitlines()[-1].split() == ["plain", "4", "1", digest]


def test_another_result_is_told(
    stories15m: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def digest(*_options: object, **environment: str) -> str:
        return "b" if environment["PYTHONHASHSEED"] == "random" else "a"

    monkeypatch.setattr(sha256_runs, "digest", digest)
    assert sha256_runs.run(stories15m, ["plain"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].split() == ["plain", "4", "2", "a", "b"]
