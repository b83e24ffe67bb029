"""Products in BF16, which float models are run with: the patched runtime has its own where there is AMX.

Without AMX both libraries compute the same, and the first test says no more than that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from tests.runtime.logits_process import LogitsProcess
from tests.runtime.tiny_models import is_linear, llama, write

pytestmark = pytest.mark.engine


def bf16(n_ff: int, path: Path) -> Path:
    model = llama(n_layer=1, n_ff=n_ff)
    return write(model, path, {name: Type.BF16 for name in model.tensors if is_linear(name)})


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("tokens", "n_ff"),
    [
        *((tokens, 128) for tokens in (7, 15, 16, 17, 31, 32, 33, 48, 61)),
        # the down projection's sums go on from one part of the row to the next, the last one shorter
        *((tokens, n_ff) for n_ff in (512, 544, 1056) for tokens in (16, 40)),
        (40, 144),  # not whole tiles: llama.cpp's own product
    ],
)
def test_products_are_those_of_the_unpatched_library(
    tokens: int, n_ff: int, patched: LogitsProcess, stock: LogitsProcess, tmp_path: Path
) -> None:
    """Up to sums in another order, which may round an activation to its other neighbour."""
    path = bf16(n_ff, tmp_path / "bf16.gguf")
    prompt = np.random.default_rng(tokens).integers(0, 96, tokens).tolist()
    ours, theirs = (process.run(path, prompt=prompt).logits for process in (patched, stock))
    assert np.abs(theirs).max() > 1
    np.testing.assert_allclose(ours, theirs, atol=0.02)
    assert np.sqrt(np.mean((ours - theirs) ** 2)) < 1e-3


@pytest.mark.parametrize("tokens", [16, 33])
def test_threads_do_not_change_them(tokens: int, patched: LogitsProcess, tmp_path: Path) -> None:
    path = bf16(1056, tmp_path / "bf16.gguf")
    prompt = np.random.default_rng(tokens).integers(0, 96, tokens).tolist()
    one, several = (patched.run(path, prompt=prompt, threads=n).logits for n in (1, 3))
    np.testing.assert_array_equal(several, one)
