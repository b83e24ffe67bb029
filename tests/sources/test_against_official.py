"""The float layout equals llama.cpp's own converter's file: every key, value and type, every tensor byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model

from .cases import CASES

pytestmark = pytest.mark.oracle

RUNS = [
    *((name, outtype, case.pre) for name, case in CASES.items() for outtype in case.outtypes),
    # no name given: the hash of a real vocabulary has to be found
    ("real-tokenizer-smollm2", "bf16", None),
    ("real-tokenizer-stories", "bf16", None),
]
# GGUFReader's own fields, not the file's
READER_FIELDS = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count")
# compared without order: gguf-py lists a set there, we sort
UNORDERED = ("tokenizer.chat_templates",)


def metadata(file: GGUFReader) -> dict[str, tuple[Any, Any]]:
    pairs = {}
    for key, field in file.fields.items():
        if key not in READER_FIELDS:
            value = sorted(field.contents()) if key in UNORDERED else field.contents()
            pairs[key] = ([kind.name for kind in field.types], value)
    return pairs


@pytest.mark.parametrize(("name", "outtype", "pre"), RUNS, ids=[f"{n}-{o}" for n, o, _ in RUNS])
def test_file_equals_official(
    official_files: Path, tmp_path: Path, name: str, outtype: str, pre: str | None
) -> None:
    ours = tmp_path / "ours.gguf"
    model = open_model(official_files / name, pre_tokenizer=pre)
    convert(model, ours, Recipe(layout="float", outtype=outtype))
    mine, theirs = GGUFReader(ours), GGUFReader(official_files / f"{name}.{outtype}.gguf")

    assert metadata(mine) == metadata(theirs)
    assert [(t.name, t.tensor_type, list(t.shape)) for t in mine.tensors] == [
        (t.name, t.tensor_type, list(t.shape)) for t in theirs.tensors
    ]
    for a, b in zip(mine.tensors, theirs.tensors, strict=True):
        assert a.data.tobytes() == b.data.tobytes(), a.name


def test_metadata_keeps_official_order(official_files: Path) -> None:
    """Tools show keys in file order; without the two that the writer adds, the order is the official one."""
    model = open_model(official_files / "mistral-float32")
    theirs = GGUFReader(official_files / "mistral-float32.f32.gguf")
    added = ("general.file_type", "general.quantization_version", *READER_FIELDS)
    assert list(model.metadata) == [key for key in theirs.fields if key not in added]


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
