"""Our float files compute in llama.cpp what transformers computes from the checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from tests.runtime.logits_process import LogitsProcess

from .family_cases import FAMILY_CASES

pytestmark = [pytest.mark.oracle, pytest.mark.engine]


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_logits_equal_transformers(
    official_files: Path, stock: LogitsProcess, tmp_path: Path, name: str
) -> None:
    expected = np.load(official_files / f"{name}.logits.npy")
    path = tmp_path / "f32.gguf"
    model = open_model(official_files / name, pre_tokenizer=FAMILY_CASES[name].pre)
    convert(model, path, Recipe(layout="float", outtype="f32"))
    answer = stock.run(path)
    assert answer.refused == "", answer.log
    # large enough that a layer gone wrong shows
    assert 0.3 < expected.std() < 5
    np.testing.assert_allclose(answer.logits, expected, rtol=0, atol=1e-3)
