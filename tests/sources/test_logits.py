"""Our float files compute in llama.cpp what transformers computes from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.convert import ConversionReport, convert
from gguf_splitquant.gguf_io.pairs import read_pairs
from gguf_splitquant.planning import Role
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from tests.runtime.foreign_process import CONTINUED, ForeignProcess
from tests.runtime.logits_process import PROMPT, LogitsProcess

from .family_cases import FAMILY_CASES

pytestmark = [pytest.mark.oracle, pytest.mark.engine]


each_family = pytest.mark.parametrize("name", FAMILY_CASES)


def written(checkpoints: Path, name: str, path: Path, recipe: Recipe) -> ConversionReport:
    model = open_model(checkpoints / name, pre_tokenizer=FAMILY_CASES[name].pre)
    return convert(model, path, recipe)


@each_family
def test_logits_equal_transformers(
    official_files: Path, stock: LogitsProcess, tmp_path: Path, name: str
) -> None:
    expected = np.load(official_files / f"{name}.logits.npy")
    recipe = Recipe(layout="float", outtype="f32")
    answer = stock.run(written(official_files, name, tmp_path / "f32.gguf", recipe).path)
    assert answer.refused == "", answer.log
    # large enough that a layer gone wrong shows
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=1e-3)


@each_family
def test_split_file_runs_in_the_patched_engine(
    official_files: Path, patched: LogitsProcess, tmp_path: Path, name: str
) -> None:
    """Every weight that the plan splits is one whose sub-layers the engine sums: nothing is rounded here."""
    expected = np.load(official_files / f"{name}.logits.npy")
    recipe = Recipe(k=2, bits=32, outtype="f32")
    report = written(official_files, name, tmp_path / "split.gguf", recipe)
    assert all(len(t.outputs) == 2 for t in report.plan.tensors if t.role is Role.LINEAR)
    answer = patched.run(report.path)
    assert answer.refused == "", answer.log
    np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=1e-3)


def letter_of(path: Path) -> int:
    """A token that is a letter."""
    tokens = read_pairs(path)["tokenizer.ggml.tokens"].value
    return next(
        i for i, token in enumerate(tokens) if len(token) == 1 and token.isascii() and token.isalpha()
    )


@each_family
def test_stock_file_runs_in_a_prebuilt_llama_cpp(
    official_files: Path, prebuilt: ForeignProcess, tmp_path: Path, name: str
) -> None:
    """A binary that others built gives the probabilities that transformers gives."""
    logits = np.load(official_files / f"{name}.logits.npy")[len(PROMPT) - 1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    recipe = Recipe(layout="stock", qtype="Q8_0", calibration="none", outtype="f32")
    report = written(official_files, name, tmp_path / "stock.gguf", recipe)
    assert sum(t.refined for t in report.plan.tensors) >= 4
    answer = prebuilt.run(report.path, len(expected), letter_of(report.path))
    assert answer.refused == ""
    assert answer.decoded == CONTINUED
    assert np.exp(answer.log_probabilities).sum() == pytest.approx(1, abs=1e-4)
    # eight bits per weight and activation
    assert np.sqrt(np.mean((answer.log_probabilities - expected) ** 2)) < 0.05 * expected.std()


@pytest.mark.parametrize("name", ["Llama", "Qwen3-MoE", "Mamba"])
def test_split_file_is_refused_by_a_prebuilt_llama_cpp(
    official_files: Path, prebuilt: ForeignProcess, tmp_path: Path, name: str
) -> None:
    recipe = Recipe(k=2, bits=32, outtype="f32")
    report = written(official_files, name, tmp_path / "split.gguf", recipe)
    assert "wrong number of tensors" in prebuilt.run(report.path, 1, 0).refused
