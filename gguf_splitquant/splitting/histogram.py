"""Histograms of weight values, because clustering them needs only the distinct values and their counts.

A BF16 or F16 tensor has at most 65,536 distinct values however large it is, so one counting pass replaces
the tensor for k-means and the result stays exact. F32 tensors of up to 2**20 values are kept as their
distinct values too; larger ones are binned on the leading 20 bits (sign, exponent, 11 bits of mantissa),
each bin represented by its mean.

The counting pass is also where NaN and Inf are found.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from ..sources.model import FloatType, SourceTensor, to_float32

SLAB_VALUES = 1 << 21
"""Values per slab: small enough that a worker's scratch arrays stay in the tens of megabytes."""

_EXACT_F32_VALUES = 1 << 20
_F32_BIN_SHIFT = 12


def row_slabs(tensor: SourceTensor, slab_values: int = SLAB_VALUES) -> Iterator[tuple[int, NDArray[Any]]]:
    """Yield ``(first_row, raw_slab)`` along the first axis, each slab of about ``slab_values`` values."""
    row_values = max(1, tensor.n_params // max(1, tensor.shape[0]))
    step = max(1, slab_values // row_values)
    for start in range(0, tensor.shape[0], step):
        yield start, tensor.read_rows(start, min(start + step, tensor.shape[0]))


def check_finite(tensor: SourceTensor, first_row: int, raw: NDArray[Any]) -> None:
    """Raise CheckpointError if the slab holds NaN or Inf: with the first position, and the tensor's count."""
    bad = _not_finite(raw, tensor.dtype)
    if not bad.any():
        return
    position = np.unravel_index(int(np.argmax(bad)), bad.shape)
    index = [first_row + int(position[0]), *(int(i) for i in position[1:])]
    value = float(to_float32(raw[position], tensor.dtype))
    count = sum(int(np.count_nonzero(_not_finite(slab, tensor.dtype))) for _, slab in row_slabs(tensor))
    raise CheckpointError(
        tensor.name,
        f"holds NaN or Inf: {count} of {tensor.n_params} values, the first at {index} ({value})"
        + (f", in {tensor.origin}" if tensor.origin else ""),
        "repair or download the checkpoint again",
    )


def _not_finite(raw: NDArray[Any], dtype: FloatType) -> NDArray[np.bool_]:
    if dtype is FloatType.BF16:
        return np.asarray((raw & np.uint16(0x7F80)) == 0x7F80)
    return np.asarray(~np.isfinite(raw))


@dataclass(frozen=True)
class ValueHistogram:
    """Distinct values of a tensor, or means of narrow bins, with how often they occur.

    Attributes:
        values: float64 ``(n,)``, strictly ascending. Negative zero counts as zero.
        counts: int64 ``(n,)``, positive.
        exact: every entry is one distinct value, not a bin.
    """

    values: NDArray[np.float64]
    counts: NDArray[np.int64]
    exact: bool

    @classmethod
    def of(cls, tensor: SourceTensor) -> ValueHistogram:
        """Count a tensor's values slab by slab. Raises CheckpointError on NaN or Inf."""
        if tensor.dtype is FloatType.F32:
            return cls._of_f32(tensor)
        # numba takes its time, and planning counts nothing
        from .kernels import count_patterns

        counts = np.zeros(1 << 16, np.int64)
        for _, raw in row_slabs(tensor):
            count_patterns(raw.view(np.uint16).ravel(), counts)
        patterns = np.flatnonzero(counts).astype(np.uint16)
        raw_values = patterns if tensor.dtype is FloatType.BF16 else patterns.view(np.float16)
        if _not_finite(raw_values, tensor.dtype).any():
            for first_row, raw in row_slabs(tensor):  # once more, to say where
                check_finite(tensor, first_row, raw)
        values = to_float32(raw_values, tensor.dtype).astype(np.float64)
        return cls._merged(values, counts[patterns], exact=True)

    @classmethod
    def _of_f32(cls, tensor: SourceTensor) -> ValueHistogram:
        if tensor.n_params <= _EXACT_F32_VALUES:
            raw = tensor.read()
            check_finite(tensor, 0, raw)
            values, counts = np.unique(raw, return_counts=True)
            return cls._merged(values.astype(np.float64), counts, exact=True)
        n_bins = 1 << (32 - _F32_BIN_SHIFT)
        bin_counts = np.zeros(n_bins, np.int64)
        bin_sums = np.zeros(n_bins, np.float64)
        for first_row, raw in row_slabs(tensor):
            check_finite(tensor, first_row, raw)
            bins = (raw.view(np.uint32) >> np.uint32(_F32_BIN_SHIFT)).ravel()
            bin_counts += np.bincount(bins, minlength=n_bins)
            bin_sums += np.bincount(bins, weights=raw.ravel(), minlength=n_bins)
        used = np.flatnonzero(bin_counts)
        return cls._merged(bin_sums[used] / bin_counts[used], bin_counts[used], exact=False)

    @classmethod
    def _merged(
        cls, values: NDArray[np.float64], counts: NDArray[np.int64], *, exact: bool
    ) -> ValueHistogram:
        # both zeros compare equal, and so may the means of neighbouring bins: one entry each
        distinct, inverse = np.unique(values + 0.0, return_inverse=True)
        merged = np.bincount(inverse, weights=counts, minlength=distinct.size).astype(np.int64)
        return cls(distinct, merged, exact)
