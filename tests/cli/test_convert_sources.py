"""Other things to convert than a checkpoint, through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model


@pytest.fixture
def q8(stories15m: Path, tmp_path: Path) -> Path:
    """A quantized file of stories15M."""
    path = tmp_path / "q8.gguf"
    recipe = Recipe(layout="stock", qtype="Q8_0", embedding="Q8_0", calibration="none")
    convert(open_model(stories15m), path, recipe)
    return path


def test_requantizing_warns(q8: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.gguf"
    arguments = ["convert", str(q8), str(out), "--recipe", "paper"]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "already quantized: 43 Q8_0" in error
    assert not out.exists()
    assert main([*arguments, "--allow-requantize"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith(f"warning: {q8.name}: ") and "43 Q8_0" in said.err
    assert f"{out}: " in said.out


@pytest.mark.oracle
def test_official_converter(
    official_converter: Path, stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = tmp_path / "ours.gguf", tmp_path / "theirs.gguf"
    options = ["--recipe", "stock", "--type", "Q8_0", "--no-calibration"]
    f16 = tmp_path / "f16.gguf"
    convert(open_model(stories15m), f16, Recipe(layout="float", outtype="f16"))
    assert main(["convert", str(f16), str(ours), *options]) == 0
    official = ["--official-converter", str(official_converter.parent)]
    assert main(["convert", str(stories15m), str(theirs), *options, *official]) == 0
    assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f16.gguf", "ours.gguf", "theirs.gguf"]
    capsys.readouterr()
    assert main(["verify", str(theirs), "--source", str(stories15m), *official]) == 0
    assert capsys.readouterr().out.startswith("match: ")
