"""Tensors made from other tensors, still read slab by slab.

A checkpoint holds some weights otherwise than llama.cpp wants them: experts one by one, heads in another
order, a matrix transposed. What is here changes how a slab is read, so that asking for a part of the result
reads that part (and what it cannot be had without), never the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .model import FloatType, SourceTensor, to_float32

_CHUNK_VALUES = 1 << 20
"""Values that a transposition holds beside its result."""


def stacked(name: str, parts: Sequence[SourceTensor]) -> SourceTensor:
    """Tensors of one shape, one behind the other along a new first axis. A slab reads its parts only.

    Args:
        name: of the result.
        parts: at least one, in order.

    Raises:
        CheckpointError: they differ in shape or type.
    """
    first = parts[0]
    for part in parts:
        if (part.shape, part.dtype) != (first.shape, first.dtype):
            raise CheckpointError(
                part.origin,
                f"{part.dtype.value} {list(part.shape)}, but {first.name} is {first.dtype.value} "
                f"{list(first.shape)}: they become one tensor",
                "download config and weights again",
            )

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        rows = np.empty((stop - start, *first.shape), first.dtype.raw_dtype)
        for row, part in zip(rows, parts[start:stop], strict=True):
            row[...] = part.read()
        return rows

    return SourceTensor(name, (len(parts), *first.shape), first.dtype, read_rows, origin=first.origin)


def part_of_each(name: str, tensor: SourceTensor, begin: int, end: int) -> SourceTensor:
    """``tensor[:, begin:end]``: of an expert stack whose matrices hold two behind each other, one.

    Reads one entry of the first axis at a time.
    """

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        rows = np.empty((stop - start, end - begin, *tensor.shape[2:]), tensor.dtype.raw_dtype)
        for index in range(start, stop):
            rows[index - start] = tensor.read_rows(index, index + 1)[0, begin:end]
        return rows

    shape = (tensor.shape[0], end - begin, *tensor.shape[2:])
    return replace(tensor, name=name, shape=shape, read_rows=read_rows)


def row_range(name: str, tensor: SourceTensor, begin: int, end: int) -> SourceTensor:
    """``tensor[begin:end]``."""
    return replace(
        tensor,
        name=name,
        shape=(end - begin, *tensor.shape[1:]),
        read_rows=lambda start, stop: tensor.read_rows(begin + start, begin + stop),
    )


def reordered(tensor: SourceTensor, source: NDArray[np.int64]) -> SourceTensor:
    """Row ``i`` of the result is row ``source[i]``; neighbours in both are read at once.

    Args:
        tensor: any rank.
        source: one index for every row.
    """

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        wanted = source[start:stop]
        rows = np.empty((stop - start, *tensor.shape[1:]), tensor.dtype.raw_dtype)
        breaks = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        for begin, end in pairwise(breaks):
            if begin < end:
                first = int(wanted[begin])
                rows[begin:end] = tensor.read_rows(first, first + end - begin)
        return rows

    return replace(tensor, read_rows=read_rows)


def transposed(tensor: SourceTensor) -> SourceTensor:
    """The matrix with its axes exchanged (``Conv1D`` of transformers' GPT-2).

    A slab of the result is a band of columns of every stored row: the file is read through for each, a few
    rows at a time.
    """
    stored_rows, stored_columns = tensor.shape
    step = max(1, _CHUNK_VALUES // max(1, stored_columns))

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        rows = np.empty((stop - start, stored_rows), tensor.dtype.raw_dtype)
        for begin in range(0, stored_rows, step):
            end = min(begin + step, stored_rows)
            rows[:, begin:end] = tensor.read_rows(begin, end)[:, start:stop].T
        return rows

    return replace(tensor, shape=(stored_columns, stored_rows), read_rows=read_rows)


def squeezed(tensor: SourceTensor) -> SourceTensor:
    """Without axes of length one, the first excepted."""
    shape = (tensor.shape[0], *(n for n in tensor.shape[1:] if n != 1))
    return replace(
        tensor,
        shape=shape,
        read_rows=lambda start, stop: tensor.read_rows(start, stop).reshape(stop - start, *shape[1:]),
    )


def elementwise(
    tensor: SourceTensor, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]
) -> SourceTensor:
    """Values through ``function``, computed in float32.

    The result is F32, except for F16, which is rounded to F16 as llama.cpp's converter, computing in the
    checkpoint's type where torch can, rounds it.
    """
    dtype = FloatType.F16 if tensor.dtype is FloatType.F16 else FloatType.F32

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        values = function(to_float32(tensor.read_rows(start, stop), tensor.dtype))
        return values.astype(dtype.raw_dtype, copy=False)

    return replace(tensor, dtype=dtype, read_rows=read_rows)
