"""llama.cpp's converter as a way in: the real one, and the ways in which it fails."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import SplitQuantError
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.engine import Engine, EngineOptions
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


UNKNOWN_FAMILY = """
import sys, torch
from transformers import AutoTokenizer, OlmoConfig, OlmoForCausalLM
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
model = OlmoForCausalLM(OlmoConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
model.to(torch.float16).save_pretrained(sys.argv[2])
tokenizer.save_pretrained(sys.argv[2])
"""


@pytest.mark.oracle
@pytest.mark.engine
def test_a_family_that_is_not_read_here_is_converted_split_and_run(
    official_converter: Path, smollm2: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "Olmo-Tiny"
    command = [sys.executable, "-c", UNKNOWN_FAMILY, str(smollm2), str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    with pytest.raises(SplitQuantError, match="OlmoForCausalLM is not supported"):
        open_model(checkpoint)
    logits = []
    with official_float_file(official_converter, checkpoint, tmp_path) as path:
        model = open_model(path)
        for recipe in (Recipe(layout="float", outtype="f32"), Recipe(k=3, bits=32, outtype="f32")):
            out = tmp_path / "out.gguf"
            convert(model, out, recipe, force=True)
            with Engine(out, EngineOptions(n_threads=1, kv="f32", flash_attention=False)) as engine:
                tokens = engine.tokenize("The quick brown fox")
                logits.append(np.concatenate([slab.logits for slab in engine.logits(tokens)]))
    assert len(gguf.GGUFReader(out).tensors) > len(model.tensors)
    np.testing.assert_allclose(logits[1], logits[0], atol=1e-4)
