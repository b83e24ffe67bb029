"""Compiled passes over the rows of a weight, before blocks are solved and where none are."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .scales import F32, round_f16


@njit(cache=True, nogil=True)
def turn_columns(weight: F32, order: NDArray[np.int64], out: F32) -> None:
    """Columns in an order as rows: ``out[i, r] = weight[r, order[i]]``.

    A few rows at a time, so that what one load brings into the cache is used before it goes: twice as fast as
    numpy's copy of a transposed array.
    """
    rows = weight.shape[0]
    for first in range(0, rows, 16):
        stop = min(first + 16, rows)
        for i in range(order.shape[0]):
            column = order[i]
            for r in range(first, stop):
                out[i, r] = weight[r, column]


@njit(cache=True, nogil=True)
def round_to_bytes(weight: F32, scale: F32, codes: NDArray[np.int8]) -> float:
    """Every value to the nearest of 255 steps of its block of 32, as ``quantize_row_q8_0_ref`` does.

    Args:
        weight: (rows, columns), columns a multiple of 32.
        scale: receives each block's step, rounded to f16 (rows, columns / 32).
        codes: receives the number of steps (rows, columns).

    Returns:
        The sum of squared errors.
    """
    lost = 0.0
    for row in range(weight.shape[0]):
        for block in range(weight.shape[1] // 32):
            first = 32 * block
            largest = np.float32(0)
            for i in range(first, first + 32):
                largest = max(largest, abs(weight[row, i]))
            step = largest / np.float32(127)
            per = np.float32(1) / step if step > 0 else np.float32(0)
            stored = round_f16(step)
            scale[row, block] = stored
            for i in range(first, first + 32):
                x = weight[row, i]
                scaled = x * per
                # halves go away from zero
                code = np.floor(abs(scaled) + np.float32(0.5))
                code = code if scaled >= 0 else -code
                codes[row, i] = np.int8(code)
                miss = np.float64(x) - np.float64(code) * np.float64(stored)
                lost += miss * miss
    return lost
