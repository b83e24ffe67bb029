"""A real model's files in a llama.cpp that others built: stock ones run, split ones are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from gguf_splitquant.convert import convert
from gguf_splitquant.planning.allocate import Piece
from gguf_splitquant.planning.refined import RefinedPlan, channel_orders, one_type
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import SourceModel
from tests.gguf_files import convert_once
from tests.runtime.foreign_process import CONTINUED, ForeignProcess
from tests.runtime.logits_process import PROMPT, LogitsProcess

pytestmark = pytest.mark.engine

VOCABULARY, LETTER = 32000, 29891
TOP = 200


@pytest.mark.parametrize("qtype", ["IQ4_NL", "Q4_0", "Q5_1", "Q8_0"])
def test_a_stock_file_says_there_what_it_says_here(
    stories15m: Path, stock: LogitsProcess, prebuilt: ForeignProcess, tmp_path: Path, qtype: str
) -> None:
    recipe = Recipe(layout="stock", qtype=qtype, calibration="none")
    path = convert_once(stories15m, tmp_path, recipe, "stock")
    here = stock.run(path).logits[len(PROMPT) - 1].astype(np.float64)
    here -= here.max() + np.log(np.exp(here - here.max()).sum())
    there = prebuilt.run(path, VOCABULARY, LETTER, TOP)
    assert there.refused == "" and there.decoded == CONTINUED
    assert np.nanargmax(there.log_probabilities) == np.argmax(here)
    asked = np.flatnonzero(np.isfinite(there.log_probabilities))
    assert len(asked) == TOP
    # other kernels round activations to eight bits in other places
    assert np.sqrt(np.mean((there.log_probabilities - here)[asked] ** 2)) < 0.05


def value_split(model: SourceModel, path: Path) -> None:
    convert(model, path, Recipe(k=3, bits=4))


def channel_split(model: SourceModel, path: Path) -> None:
    one = one_type(model, Recipe(layout="stock", qtype="Q8_0")).pieces
    pieces = {**one, "blk.3.attn_q.weight": (Piece(Q.Q8_0, 96), Piece(Q.Q4_0, 192))}
    recipe = Recipe(layout="split", target_bpw=8.5)
    convert(model, path, recipe, refined=RefinedPlan(pieces, channel_orders(pieces, None)))


@pytest.mark.parametrize(
    ("write", "reason"), [(value_split, "wrong number of tensors"), (channel_split, "has wrong shape")]
)
def test_a_split_file_is_refused_and_the_next_one_runs(
    stories15m: Path,
    prebuilt: ForeignProcess,
    tmp_path: Path,
    write: Callable[[SourceModel, Path], None],
    reason: str,
) -> None:
    write(open_model(stories15m), tmp_path / "split.gguf")
    assert reason in prebuilt.run(tmp_path / "split.gguf", VOCABULARY, LETTER).refused
    float_file = convert_once(stories15m, tmp_path, Recipe(layout="float"), "float")
    assert prebuilt.run(float_file, VOCABULARY, LETTER, 1).decoded == CONTINUED
