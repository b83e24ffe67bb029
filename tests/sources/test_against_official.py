"""The float layout equals llama.cpp's own converter's file: every key, value and type, every tensor byte."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model

from .cases import Case
from .family_cases import ALL_CASES, FAMILY_CASES, REAL_TOKENIZERS
from .raw_gguf import RawGGUF, read_raw

pytestmark = pytest.mark.oracle

RUNS = [
    *(
        (name, outtype)
        for name, case in ALL_CASES.items()
        if not case.no_official
        for outtype in case.outtypes
    ),
    # no name given: the hash of a real vocabulary has to be found
    *((name, "bf16") for name in REAL_TOKENIZERS),
]
# gguf-py writes the names of chat templates from a set, in an order that changes from run to run
UNORDERED = "tokenizer.chat_templates"
# the converter adds two in the middle, our writer at the end; it adds template files as the folder lists them
MOVED = ("general.file_type", "general.quantization_version", "tokenizer.chat_template")

Pair = Callable[[str, str], tuple[RawGGUF, RawGGUF]]
each_run = pytest.mark.parametrize(("name", "outtype"), RUNS, ids=[f"{n}-{o}" for n, o in RUNS])


@pytest.fixture(scope="session")
def pair(official_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Our file and the official one, by case and output type."""
    folder = tmp_path_factory.mktemp("ours")
    read: dict[tuple[str, str], tuple[RawGGUF, RawGGUF]] = {}

    def both(name: str, outtype: str) -> tuple[RawGGUF, RawGGUF]:
        if (name, outtype) not in read:
            ours = folder / f"{name}.{outtype}.gguf"
            model = open_model(official_files / name, pre_tokenizer=case_of(name).pre)
            convert(model, ours, Recipe(layout="float", outtype=outtype))
            read[name, outtype] = read_raw(ours), read_raw(official_files / ours.name)
        return read[name, outtype]

    return both


def case_of(name: str) -> Case:
    return ALL_CASES.get(name, Case("", "", ""))


def is_tokenizer(key: str) -> bool:
    return key.startswith("tokenizer.")


@each_run
def test_metadata_equals_official(pair: Pair, name: str, outtype: str) -> None:
    mine, theirs = pair(name, outtype)
    only_ours = {key for key in mine.pairs if key.endswith(tuple(case_of(name).only_ours))}
    assert mine.pairs.keys() - only_ours == theirs.pairs.keys()
    for key in filter(lambda key: not is_tokenizer(key), theirs.pairs):
        assert mine.pairs[key] == theirs.pairs[key], key
    moved = (*MOVED, *case_of(name).moved)

    def in_order(keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key not in only_ours and not key.startswith(moved)]

    assert in_order(mine.pairs) == in_order(theirs.pairs)


@each_run
def test_tokenizer_equals_official(pair: Pair, name: str, outtype: str) -> None:
    mine, theirs = pair(name, outtype)
    assert set(filter(is_tokenizer, mine.pairs)) == set(filter(is_tokenizer, theirs.pairs))
    for key in filter(is_tokenizer, theirs.pairs):
        value = theirs.pairs[key]
        if key == UNORDERED:
            assert sorted(re.findall(rb"[a-z_]+", mine.pairs[key])) == sorted(re.findall(rb"[a-z_]+", value))
        else:
            assert mine.pairs[key] == value, key


@each_run
def test_tensors_equal_official(pair: Pair, name: str, outtype: str) -> None:
    mine, theirs = pair(name, outtype)
    assert list(mine.tensors) == list(theirs.tensors)
    last_bit = tuple(case_of(name).last_bit)
    for tensor, (shape, kind, data) in theirs.tensors.items():
        assert mine.tensors[tensor][:2] == (shape, kind), tensor
        if tensor.endswith(last_bit):
            bits, other = (np.frombuffer(d, np.int32) for d in (mine.tensors[tensor][2], data))
            assert np.abs(bits - other).max() <= 1, tensor
        else:
            assert mine.tensors[tensor][2] == data, tensor


@pytest.mark.parametrize("name", ["llama-2-sharded", *FAMILY_CASES])
def test_slabs_equal_whole(official_files: Path, name: str) -> None:
    """Any slab of any tensor, permuted heads and stacked experts included, is that part of the whole."""
    model = open_model(official_files / name, pre_tokenizer=ALL_CASES[name].pre)
    random = np.random.default_rng(0)
    for tensor in model.tensors:
        whole = tensor.read()
        assert whole.shape == tensor.shape and whole.dtype == tensor.dtype.raw_dtype
        for _ in range(8):
            start, stop = sorted(random.integers(0, tensor.shape[0] + 1, 2))
            assert np.array_equal(
                tensor.read_rows(int(start), int(stop)).view(np.uint8), whole[start:stop].view(np.uint8)
            )


def test_heads(official_files: Path) -> None:
    """A tied head has no tensor of its own."""
    assert open_model(official_files / "qwen2-tied", pre_tokenizer="qwen2").tied_head
    assert not open_model(official_files / "qwen2-untied", pre_tokenizer="qwen2").tied_head
