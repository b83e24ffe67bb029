"""Products in BF16, which float models are run with: the patched runtime has its own where there is AMX.

Without AMX both libraries compute the same, and the tests say so.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.runtime.logits_process import LogitsProcess
from tests.runtime.tiny_models import is_linear, llama, write

pytestmark = pytest.mark.engine

MODEL = llama(n_layer=1)
LINEAR = [name for name in MODEL.tensors if is_linear(name)]


@pytest.mark.oracle
@pytest.mark.parametrize("tokens", [7, 15, 16, 17, 31, 32, 33, 48, 61])
def test_products_are_those_of_the_unpatched_library(
    tokens: int, patched: LogitsProcess, stock: LogitsProcess, tmp_path: Path
) -> None:
    """Up to sums in another order, which may round an activation to its other neighbour."""
    path = write(MODEL, tmp_path / "bf16.gguf", dict.fromkeys(LINEAR, Type.BF16))
    prompt = np.random.default_rng(tokens).integers(0, 96, tokens).tolist()
    ours, theirs = (process.run(path, prompt=prompt).logits for process in (patched, stock))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 1e-3


@pytest.mark.parametrize("tokens", [16, 33])
def test_threads_do_not_change_them(tokens: int, patched: LogitsProcess, tmp_path: Path) -> None:
    path = write(MODEL, tmp_path / "bf16.gguf", dict.fromkeys(LINEAR, Type.BF16))
    prompt = np.random.default_rng(tokens).integers(0, 96, tokens).tolist()
    one, several = (patched.run(path, prompt=prompt, threads=n).logits for n in (1, 3))
    np.testing.assert_array_equal(several, one)
