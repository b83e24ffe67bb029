"""llama.cpp's converter as a way in: the real one, and the ways in which it fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.official import official_float_file

from .raw_gguf import read_raw


@pytest.mark.oracle
def test_the_real_converter(official_converter: Path, stories15m: Path, tmp_path: Path) -> None:
    ours = tmp_path / "ours.gguf"
    convert(open_model(stories15m), ours, Recipe(layout="float"))
    with official_float_file(official_converter.parent, stories15m, tmp_path) as path:
        model = open_model(path)
        convert(model, tmp_path / "theirs.gguf", Recipe(layout="float"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours.gguf", "theirs.gguf"]
    mine, theirs = read_raw(ours), read_raw(tmp_path / "theirs.gguf")
    assert theirs.tensors == mine.tensors
    assert theirs.pairs == mine.pairs


def script(folder: Path, text: str) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "import no_such_module",
            "No module named 'no_such_module'; run: .* -m pip install -r .*requirements",
        ),
        ("raise SystemExit('Model FooForCausalLM is not supported')", "failed: Model FooForCausalLM is not"),
        ("pass", "failed: exit code 0; run it alone"),
    ],
)
def test_failures_say_what_the_converter_said(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "model").mkdir()
    checkout = script(tmp_path / "llama.cpp", text)
    with (
        pytest.raises(SplitQuantError, match=words) as caught,
        official_float_file(checkout, tmp_path / "model", tmp_path),
    ):
        pass
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["llama.cpp", "model"]


def test_neither_checkout_nor_checkpoint(stories15m: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(SplitQuantError, match=r"no convert_hf_to_gguf\.py there; give the folder"),
        official_float_file(tmp_path, stories15m, tmp_path),
    ):
        pass
    checkout = script(tmp_path / "llama.cpp", "")
    with (
        pytest.raises(SplitQuantError, match="not a checkpoint folder"),
        official_float_file(checkout, tmp_path / "no-such-model", tmp_path),
    ):
        pass


def test_an_unknown_family_shows_the_command(stories15m: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my model"
    shutil.copytree(stories15m, folder)
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["OlmoForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SplitQuantError) as caught:
        open_model(folder)
    command = f"python convert_splitquant.py '{folder}' OUT.gguf --official-converter LLAMA_CPP_FOLDER"
    assert str(caught.value).endswith(command)
