"""Tensors made from tensors: any slab is that part of the whole, and reads no more than it has to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.errors import CheckpointError
from gguf_splitquant.sources import slabs
from gguf_splitquant.sources.model import FloatType, SourceTensor


class Recorded:
    """A tensor that knows which rows were read."""

    def __init__(self, values: np.ndarray, name: str = "x", dtype: FloatType = FloatType.F32) -> None:
        self.reads: list[tuple[int, int]] = []
        self.values = values
        self.tensor = SourceTensor(name, values.shape, dtype, self._read, origin=f"file: {name}")

    def _read(self, start: int, stop: int) -> Any:
        assert 0 <= start <= stop <= len(self.values)
        self.reads.append((start, stop))
        return self.values[start:stop].copy()

    @property
    def rows_read(self) -> int:
        return sum(stop - start for start, stop in self.reads)


def values(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def made(shape: tuple[int, ...]) -> list[tuple[SourceTensor, np.ndarray]]:
    """Every operation on a tensor of that shape, with what numpy makes of it."""
    whole = values(*shape)
    source = Recorded(whole).tensor
    order = np.random.default_rng(0).permutation(shape[0])
    rows = [Recorded(part, f"x{i}").tensor for i, part in enumerate(whole)]
    results = [
        (slabs.stacked("s", rows), whole),
        (slabs.row_range("r", source, 1, shape[0]), whole[1:]),
        (slabs.reordered(source, order), whole[order]),
        (slabs.elementwise(source, lambda v: v + np.float32(1)), whole + 1),
        (
            slabs.squeezed(Recorded(whole[:, None]).tensor),
            whole.reshape(shape[0], *(n for n in shape[1:] if n > 1)),
        ),
    ]
    if len(shape) == 2:
        results.append((slabs.transposed(source), whole.T))
    if len(shape) == 3:
        results.append((slabs.part_of_each("p", source, 1, shape[1]), whole[:, 1:]))
    return results


@given(st.lists(st.integers(1, 5), min_size=2, max_size=3), st.data())
def test_any_slab_is_that_part_of_the_whole(shape: list[int], data: st.DataObject) -> None:
    for tensor, expected in made(tuple(shape)):
        assert tensor.shape == expected.shape
        start = data.draw(st.integers(0, tensor.shape[0]))
        stop = data.draw(st.integers(start, tensor.shape[0]))
        slab = tensor.read_rows(start, stop)
        assert slab.dtype == tensor.dtype.raw_dtype
        assert np.array_equal(slab, expected[start:stop])


def test_one_expert_reads_one_expert() -> None:
    parts = [Recorded(values(3, 4) + i, f"expert {i}") for i in range(6)]
    stack = slabs.stacked("experts", [part.tensor for part in parts])
    assert stack.origin == "file: expert 0"
    np.testing.assert_array_equal(stack.read_rows(4, 5)[0], parts[4].values)
    assert [part.rows_read for part in parts] == [0, 0, 0, 0, 3, 0]


def test_part_of_each_holds_one_expert_at_a_time() -> None:
    source = Recorded(values(5, 4, 2))
    slabs.part_of_each("gate", source.tensor, 0, 2).read_rows(1, 4)
    assert source.reads == [(1, 2), (2, 3), (3, 4)]


def test_neighbours_are_read_at_once() -> None:
    source = Recorded(values(12, 2))
    by_head = np.arange(12).reshape(2, 3, 2).swapaxes(0, 1).reshape(-1)
    slabs.reordered(source.tensor, by_head).read_rows(0, 4)
    assert source.reads == [(0, 2), (6, 8)]


def test_transposition_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "_CHUNK_VALUES", 8)
    source = Recorded(values(7, 4))
    np.testing.assert_array_equal(slabs.transposed(source.tensor).read_rows(1, 3), source.values.T[1:3])
    assert source.reads == [(0, 2), (2, 4), (4, 6), (6, 7)]


@pytest.mark.parametrize(
    ("dtype", "raw", "result"),
    [
        (FloatType.F32, np.float32(2.5), np.float32(3.5)),
        # 2.5 in bfloat16
        (FloatType.BF16, np.uint16(0x4020), np.float32(3.5)),
        # rounded as the converter rounds it: 1 + 2**-11 is no half-precision number
        (FloatType.F16, np.float16(2**-11), np.float16(1)),
    ],
)
def test_types_of_changed_values(dtype: FloatType, raw: Any, result: Any) -> None:
    source = Recorded(np.array([raw]), dtype=dtype)
    changed = slabs.elementwise(source.tensor, lambda v: v + np.float32(1)).read()
    assert changed.dtype == result.dtype and changed[0] == result


@pytest.mark.parametrize(
    "other",
    [
        lambda: Recorded(values(2, 3), "second"),
        lambda: Recorded(values(3, 2).astype(np.float16), "second", FloatType.F16),
    ],
)
def test_parts_have_to_be_alike(other: Callable[[], Recorded]) -> None:
    with pytest.raises(CheckpointError, match=r"file: second: .*, but x is F32.*they become one tensor"):
        slabs.stacked("s", [Recorded(values(3, 2)).tensor, other().tensor])
