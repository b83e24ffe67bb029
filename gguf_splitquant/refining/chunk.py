"""One slab of rows while it is quantized: the sweeps over its blocks, and the packing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..sums import sums_of_squares
from .blocks import Blocks, BlockType
from .kernels import LANES, solve_block
from .metric import BlockFactors, Metric, Sweep
from .row_kernels import turn_columns
from .scales import ROUND_F16, ROUND_FREE, ROUND_LATTICE

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

PANEL = 256


def _trials(kind: type[BlockType]) -> F32:
    """Ranges to try for a block: (fraction of its range, anchor of the range or sign of the scale).

    The fractions were chosen by the loss on real layers: few levels gain from clipping a block's extremes;
    with many levels what counts is the number of draws, even of scales beyond the range.
    """
    count = len(kind.levels)
    seconds: tuple[float, ...]
    if kind.affine:
        low, high = (0.6, 1.1) if count <= 4 else (0.8, 1.15)
        fractions, seconds = np.linspace(low, high, 11), (0.0, 0.5, 1.0)
    elif count > 64:
        fractions, seconds = np.linspace(0.94, 1.06, 9), (1.0,)
    else:
        # both signs: the levels reach further on one side of zero, or stand differently there
        low, high, steps = (0.62, 1.17, 11) if count <= 16 else (0.88, 1.18, 13)
        fractions, seconds = np.linspace(low, high, steps), (1.0, -1.0)
    return np.array([(f, s) for f in fractions for s in seconds], np.float32)


class _Part:
    """The columns of one cluster, in visiting order: its codes and scales."""

    def __init__(self, kind: type[BlockType], start: int, places: NDArray[np.int64], lanes: int) -> None:
        self.kind, self.start, self.places = kind, start, places
        self.in_order = bool((np.diff(places) == 1).all())
        columns = len(places)
        self.stop = start + columns
        self.codes = np.zeros((columns, lanes), np.uint8)
        self.scale = np.zeros((columns // kind.sub, lanes), np.float32)
        self.offset = np.zeros_like(self.scale)
        self.unit = np.zeros((columns // kind.block, lanes), np.float32)
        self.offset_unit = np.zeros_like(self.unit)
        self.levels = np.array(kind.levels, np.float32)
        self.middles = (0.5 * (self.levels[1:] + self.levels[:-1])).astype(np.float32)
        self.trials = _trials(kind)
        self.uniform = kind.uniform()
        self.lattice = kind.scale_steps is not None

    def solve(
        self,
        factors: BlockFactors,
        b: int,
        target: F32,
        weight: F32,
        deviation: F32,
        change: F32,
        first: bool,
    ) -> float:
        """Quantize sub-block ``b``; return the loss that this saved (minus the loss, if ``first``)."""
        sub, home = self.kind.sub, b * self.kind.sub // self.kind.block
        k_low, k_high = self.kind.scale_steps or (0, 0)
        return solve_block(
            target,
            weight,
            factors.low[b],
            factors.weight[b],
            factors.gram[b],
            self.levels,
            self.middles,
            self.uniform,
            self.kind.affine,
            self.kind.affine and self.lattice,
            self.trials if first else self.trials[:0],
            2,
            1,
            ROUND_LATTICE if self.lattice else ROUND_F16,
            self.unit[home],
            self.offset_unit[home],
            k_low,
            k_high,
            self.kind.offset_steps,
            first,
            self.scale[b],
            self.offset[b],
            self.codes[b * sub : (b + 1) * sub],
            deviation,
            change,
        )

    def choose_units(self, factors: BlockFactors, home: int, target: F32) -> None:
        """Set the super-block's units from what its sub-blocks would choose alone and unrounded."""
        sub = self.kind.sub
        count, lanes = self.kind.block // sub, target.shape[1]
        scale = np.zeros((count, lanes), np.float32)
        offset = np.zeros_like(scale)
        spare = [np.zeros((sub, lanes), np.float32) for _ in range(2)]
        none = np.zeros(lanes, np.float32)
        for i in range(count):
            b = home * count + i
            part = target[i * sub : (i + 1) * sub]
            solve_block(
                part,
                part,
                factors.low[b],
                factors.weight[b],
                factors.gram[b],
                self.levels,
                self.middles,
                self.uniform,
                self.kind.affine,
                self.kind.affine,
                self.trials,
                2,
                0,
                ROUND_FREE,
                none,
                none,
                0,
                0,
                0,
                True,
                scale[i],
                offset[i],
                np.zeros((sub, lanes), np.uint8),
                *spare,
            )
        assert self.kind.scale_steps is not None
        low, high = self.kind.scale_steps
        if low < 0:  # the largest scale takes the end that has one more step
            largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=0)[None], axis=0)[0]
            self.unit[home] = (largest / low).astype(np.float16)
        else:
            self.unit[home] = (scale.max(axis=0) / high).astype(np.float16)
        if self.kind.affine:
            self.offset_unit[home] = (-offset.min(axis=0) / self.kind.offset_steps).astype(np.float16)

    def pack(self, rows: int) -> U8:
        """Back to file order, then the type's own bytes."""
        kind = self.kind
        per_block = kind.block // kind.sub

        def in_file_order(values: NDArray[Any], group: int) -> NDArray[Any]:
            visited = np.ascontiguousarray(values[:, :rows].T)
            if self.in_order:
                return visited
            restored = np.empty_like(visited)
            restored[:, self.places[::group] // group] = visited
            return restored

        blocks = Blocks(
            codes=in_file_order(self.codes, 1).reshape(-1, kind.block),
            scale=in_file_order(self.scale, kind.sub).reshape(-1, per_block),
            offset=in_file_order(self.offset, kind.sub).reshape(-1, per_block),
            unit=in_file_order(self.unit, kind.block).reshape(-1),
            offset_unit=in_file_order(self.offset_unit, kind.block).reshape(-1),
        )
        return kind.pack(blocks).reshape(rows, -1)


class Chunk:
    """The state of one slab of rows, transposed and in visiting order; lanes past the rows are zero.

    Attributes:
        error: the loss so far, summed over the rows.
    """

    def __init__(self, types: Sequence[type[BlockType]], metric: Metric, weight: F32) -> None:
        """``weight``: float32 (rows, input channels); ``types``: of the metric's clusters."""
        self.metric, self.rows = metric, len(weight)
        lanes = -(-self.rows // LANES) * LANES
        self.weight = np.zeros((weight.shape[1], lanes), np.float32)
        turn_columns(weight, metric.order, self.weight)
        self.deviation = np.zeros_like(self.weight)
        self.error = 0.0
        self.parts: list[_Part] = []
        for kind, places in zip(types, metric.places, strict=True):
            self.parts.append(_Part(kind, self.parts[-1].stop if self.parts else 0, places, lanes))

    def solve(self, revisits: int) -> list[U8]:
        """Quantize, improve, pack: each cluster's uint8 (rows, bytes per row)."""
        self._sweep(self.metric.first, first=True)
        for _ in range(revisits if self.metric.later else 0):
            assert self.metric.later is not None
            self._sweep(self.metric.later, first=False)
        return [part.pack(self.rows) for part in self.parts]

    def squared_errors(self, rows: int) -> list[float]:
        """``sum((w - q)**2)`` of every ``rows`` rows, once they are quantized."""
        return sums_of_squares(self.deviation[:, : self.rows].T, rows)

    def _sweep(self, sweep: Sweep, first: bool) -> None:
        for part, factors in zip(self.parts, sweep.factors, strict=True):
            panel = part.kind.block if part.lattice else PANEL
            for start in range(part.start, part.stop, panel):
                self._visit_panel(sweep, part, factors, start, min(part.stop, start + panel), first)

    def _visit_panel(
        self, sweep: Sweep, part: _Part, factors: BlockFactors, start: int, stop: int, first: bool
    ) -> None:
        """Bring the columns' targets up to date at once, then quantize them sub-block by sub-block."""
        sub = part.kind.sub
        known = start if first else len(self.weight)
        target = self.weight[start:stop].copy()
        if sweep.coupling is not None and known:
            target += sweep.coupling[start:stop, :known] @ self.deviation[:known]
        if first and part.lattice:
            part.choose_units(factors, (start - part.start) // part.kind.block, target)
        for begin in range(start, stop, sub):
            here = slice(begin, begin + sub)
            change = np.empty((sub, target.shape[1]), np.float32)
            self.error -= part.solve(
                factors,
                (begin - part.start) // sub,
                target[begin - start : begin - start + sub],
                self.weight[here],
                self.deviation[here],
                change,
                first,
            )
            if sweep.coupling is not None and here.stop < stop:
                target[here.stop - start :] += sweep.coupling[here.stop : stop, here] @ change
