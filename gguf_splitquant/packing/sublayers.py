"""From raw weights to the packed bytes of every sub-layer, slab by slab.

With tensor granularity (the paper) a 16-bit weight decides its code in every sub-layer by itself, so a
65,536-entry table per sub-layer replaces all arithmetic. Row and block granularity, and F32 weights,
compute. Both paths go through the reference quantizer, so they cannot disagree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..recipe import Granularity
from ..sources.model import FloatType, to_float32
from ..splitting.histogram import ValueHistogram
from ..splitting.values import ValueSplit
from ..sums import sum_of_squares
from .encodings import LinearEncoding
from .linear import LinearGrid, decode, fit_grid, quantize

_F32 = NDArray[np.float32]


class SubLayerPacker:
    """Packs slabs of one weight into its sub-layers.

    Args:
        split: the weight's value split.
        dtype: the weight's storage type, that of the slabs to come.
        encoding: the carrier.
        granularity: what shares a scale.

    Raises:
        OverflowError: values too large for an f16 scale.
    """

    def __init__(
        self, split: ValueSplit, dtype: FloatType, encoding: LinearEncoding, granularity: Granularity
    ) -> None:
        self.split = split
        self._dtype = dtype
        self._encoding = encoding
        self._granularity = granularity
        self._tensor_grids = [
            fit_grid(low, high, encoding.bits, scale_bits=encoding.scale_bits)
            for low, high in zip(split.lows, split.highs, strict=True)
        ]
        self._tables: list[NDArray[Any]] = []
        self._squared_error = 0.0
        if granularity == "tensor" and dtype is not FloatType.F32:
            self._tables = [self._table(c) for c in range(split.k)]

    def squared_error(self, histogram: ValueHistogram) -> float:
        """Sum of squared differences between the weight and the sum of its decoded sub-layers.

        Call it after the last slab; ``histogram`` is the weight's.
        """
        if not self._tables:
            return self._squared_error
        values = histogram.values.astype(np.float32)
        decoded = np.zeros(values.shape, np.float64)
        for c, grid in enumerate(self._tensor_grids):
            decoded += decode(quantize(self._member_values(values, c), grid), grid)
        return float(np.sum(histogram.counts * (values - decoded) ** 2))

    def pack(self, raw: NDArray[Any]) -> list[NDArray[np.uint8]]:
        """Pack one slab.

        Args:
            raw: ``(rows, columns)`` of the dtype's ``raw_dtype``.

        Returns:
            For each sub-layer, uint8 ``(rows, row_bytes)``.
        """
        if self._tables:
            patterns = raw.view(np.uint16)
            return [
                self._encoding.pack(patterns, self._tensor_grids[c], table)
                for c, table in enumerate(self._tables)
            ]
        values = to_float32(raw, self._dtype)
        packed = []
        for c in range(self.split.k):
            members = self._member_values(values, c)
            codes, grid = self._quantize(members, c)
            # the clusters are disjoint, so their errors add up
            self._squared_error += _squared_difference(members, codes, grid)
            packed.append(self._encoding.pack(codes, grid))
        return packed

    def _member_values(self, values: _F32, cluster: int) -> _F32:
        """One cluster's values, zeros elsewhere."""
        if self.split.k == 1:
            return values
        return np.where(self.split.members(values, cluster), values, np.float32(0))

    def _quantize(self, values: _F32, cluster: int) -> tuple[NDArray[Any], LinearGrid]:
        """Codes ``(rows, columns)`` and a grid that broadcasts to ``(rows, blocks)``."""
        if self._granularity == "tensor":
            grid = self._tensor_grids[cluster]
            return quantize(values, grid), grid
        rows, columns = values.shape
        width = columns if self._granularity == "row" else self._encoding.block_columns
        groups = values.reshape(rows, columns // width, width)
        grid = fit_grid(
            groups.min(axis=2), groups.max(axis=2), self._encoding.bits, scale_bits=self._encoding.scale_bits
        )
        codes = quantize(groups, grid[..., np.newaxis])
        return codes.reshape(rows, columns), grid

    def _table(self, cluster: int) -> NDArray[Any]:
        """The code of every 16-bit pattern in one sub-layer, ``(65536,)``."""
        patterns = np.arange(1 << 16, dtype=np.uint16)
        raw = patterns if self._dtype is FloatType.BF16 else patterns.view(np.float16)
        values = to_float32(raw, self._dtype)
        # patterns outside the weight's range, NaN and Inf among them, are never looked up
        known = (values >= self.split.lows[0]) & (values <= self.split.highs[-1])
        values = np.where(known, values, np.float32(0))
        return quantize(self._member_values(values, cluster), self._tensor_grids[cluster])


def _squared_difference(values: _F32, codes: NDArray[Any], grid: LinearGrid) -> float:
    """Sum of squares of ``values - decode(codes)``; ``grid`` broadcasts to ``(rows, groups)``."""
    if grid.scale.ndim == 0:
        difference = values - decode(codes, grid)
    else:
        groups = (values.shape[0], grid.scale.shape[1], -1)
        difference = values.reshape(groups) - decode(codes.reshape(groups), grid[..., np.newaxis])
    return sum_of_squares(difference)
