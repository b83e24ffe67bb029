"""What a block's scale may be: compiled arithmetic that the inner loops share.

numba compares a cached function with its own file alone, not with the files of what it calls: after a change
here delete ``__pycache__`` (the tests do).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

F32 = NDArray[np.float32]

ROUND_FREE, ROUND_F16, ROUND_LATTICE = 0, 1, 2
"""What a scale may be: any float; an f16; an integer multiple of the super-block's unit."""


@njit(cache=True, nogil=True)
def round_f16(value: np.float32) -> np.float32:
    """``value`` rounded to the nearest IEEE half (ties to even), saturating. No fast-math here."""
    magnitude = abs(value)
    if magnitude < 6.103515625e-05:  # below the normal halves the spacing is constant: 2^-24
        return np.float32(np.rint(np.float64(value) * 16777216.0) / 16777216.0)
    if magnitude > 65504.0:
        return np.float32(65504.0 if value > 0 else -65504.0)
    # Veltkamp's split in double keeps the 11 leading bits, rounding to nearest even
    wide = np.float64(value)
    spread = wide * 4398046511105.0  # 2^42 + 1: 53 - 42 = 11 bits stay
    return np.float32(spread - (spread - wide))


@njit(cache=True, nogil=True)
def reciprocal(scale: np.float32) -> np.float32:
    """1 / scale; 0 for a scale of (nearly) nothing, whose levels are all 0 anyway."""
    return np.float32(1) / scale if abs(scale) > np.float32(1e-30) else np.float32(0)


@njit(cache=True, nogil=True)
def admit(
    scale: F32,
    offset: F32,
    affine: bool,
    rounding: int,
    unit: F32,
    offset_unit: F32,
    k_low: int,
    k_high: int,
    l_high: int,
) -> None:
    """Round scales and offsets, in place, to what the type can store."""
    for r in range(scale.shape[0]):
        if rounding == ROUND_F16:
            scale[r] = round_f16(scale[r])
            if affine:
                offset[r] = round_f16(offset[r])
        elif rounding == ROUND_LATTICE:
            k = np.float32(0)
            if unit[r] != 0:
                k = min(max(np.rint(scale[r] / unit[r]), np.float32(k_low)), np.float32(k_high))
            scale[r] = k * unit[r]
            if affine:
                k = np.float32(0)
                if offset_unit[r] != 0:
                    k = min(max(np.rint(-offset[r] / offset_unit[r]), np.float32(0)), np.float32(l_high))
                offset[r] = -k * offset_unit[r]
