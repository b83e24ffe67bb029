"""The float layout equals llama.cpp's own converter's file: every key, value and type, every tensor byte."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model

from .cases import CASES
from .raw_gguf import read_raw

pytestmark = pytest.mark.oracle

RUNS = [
    *((name, outtype, case.pre) for name, case in CASES.items() for outtype in case.outtypes),
    # no name given: the hash of a real vocabulary has to be found
    ("real-tokenizer-smollm2", "bf16", None),
    ("real-tokenizer-stories", "bf16", None),
]
# gguf-py writes the names of chat templates from a set, in an order that changes from run to run
UNORDERED = "tokenizer.chat_templates"
# the converter adds two in the middle, our writer at the end; it adds template files as the folder lists them
MOVED = ("general.file_type", "general.quantization_version", "tokenizer.chat_template")


def in_order(keys: Iterable[str]) -> list[str]:
    """Keys whose place in the file has to be the official one."""
    return [key for key in keys if not key.startswith(MOVED)]


@pytest.mark.parametrize(("name", "outtype", "pre"), RUNS, ids=[f"{n}-{o}" for n, o, _ in RUNS])
def test_file_equals_official(
    official_files: Path, tmp_path: Path, name: str, outtype: str, pre: str | None
) -> None:
    ours = tmp_path / "ours.gguf"
    model = open_model(official_files / name, pre_tokenizer=pre)
    convert(model, ours, Recipe(layout="float", outtype=outtype))
    mine, theirs = read_raw(ours), read_raw(official_files / f"{name}.{outtype}.gguf")

    assert mine.pairs.keys() == theirs.pairs.keys()
    for key, value in theirs.pairs.items():
        if key == UNORDERED:
            assert sorted(re.findall(rb"[a-z_]+", mine.pairs[key])) == sorted(re.findall(rb"[a-z_]+", value))
        else:
            assert mine.pairs[key] == value, key
    assert in_order(mine.pairs) == in_order(theirs.pairs)

    assert list(mine.tensors) == list(theirs.tensors)
    for tensor, (shape, kind, data) in theirs.tensors.items():
        assert mine.tensors[tensor][:2] == (shape, kind), tensor
        assert mine.tensors[tensor][2] == data, tensor


def test_slabs_equal_whole(official_files: Path) -> None:
    """Any slab of any tensor, permuted heads included, is that part of the whole."""
    model = open_model(official_files / "llama-2-sharded")
    random = np.random.default_rng(0)
    for tensor in model.tensors:
        whole = tensor.read()
        assert whole.shape == tensor.shape and whole.dtype == tensor.dtype.raw_dtype
        for _ in range(8):
            start, stop = sorted(random.integers(0, tensor.shape[0] + 1, 2))
            assert np.array_equal(
                tensor.read_rows(int(start), int(stop)).view(np.uint16), whole[start:stop].view(np.uint16)
            )


def test_heads(official_files: Path) -> None:
    """A tied head has no tensor of its own."""
    assert open_model(official_files / "qwen2-tied", pre_tokenizer="qwen2").tied_head
    assert not open_model(official_files / "qwen2-untied", pre_tokenizer="qwen2").tied_head
