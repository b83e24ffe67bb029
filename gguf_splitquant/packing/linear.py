"""The reference linear quantizer: what a packed file must decode to, in a few lines of arithmetic.

A group of values (a sub-layer, a row or a block) has one scale s and one zero point z and decodes as
``s * (code - z)``. Zero is always exact, since a sub-layer is mostly zeros: z is an integer code.

* INT4 and INT2 use unsigned codes 0 to 2**bits - 1. A group with both signs gets the usual asymmetric grid
  over [min, max]. A one-sided group, which is what the outer clusters are, gets z = 0 and a scale that
  carries the sign: the range [min, 0] or [0, max] with every code used, and nothing to cancel at run time.
* INT8 is symmetric, z = 0 and codes -127 to 127: ggml's 8-bit weights have no offset.

Scales are rounded to what the file stores (f16, or fewer bits where scale * zero point must be exact too)
*before* codes are chosen, so the codes are the best ones for the scale that will be used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_F32 = NDArray[np.float32]

_F16_MAX = 65504.0
_F16_STEP = 2.0**-24
"""The spacing of f16 subnormals: every f16 is a multiple of it."""


@dataclass(frozen=True)
class LinearGrid:
    """Scale and zero point of each group.

    Attributes:
        scale: float32, any shape; f16-representable, negative for a group of only negative values, 0 for a
            group of zeros.
        zero: int32, the same shape; the code that decodes to 0.
        bits: 8, 4 or 2.
    """

    scale: _F32
    zero: NDArray[np.int32]
    bits: int

    @property
    def code_range(self) -> tuple[int, int]:
        """Least and greatest code."""
        return (-127, 127) if self.bits == 8 else (0, 2**self.bits - 1)

    def __getitem__(self, index: Any) -> LinearGrid:
        return LinearGrid(self.scale[index], self.zero[index], self.bits)


def fit_grid(low: _F32, high: _F32, bits: int, *, scale_bits: int = 11) -> LinearGrid:
    """The grid over [low, high], widened to hold zero.

    Args:
        low, high: least and greatest value of each group, float32, the same shape (0-d allowed).
        bits: 8, 4 or 2.
        scale_bits: significant bits of a two-sided group's scale; 11 is all of f16.

    Raises:
        OverflowError: a scale does not fit in f16 (values beyond about 10**5).
    """
    low = np.minimum(np.asarray(low, np.float32), 0).astype(np.float64)
    high = np.maximum(np.asarray(high, np.float32), 0).astype(np.float64)
    if bits == 8:
        scale = _round_scale(np.maximum(-low, high) / 127, 11)
        return LinearGrid(scale, np.zeros(scale.shape, np.int32), bits)
    levels = 2**bits - 1
    two_sided = (low < 0) & (high > 0)
    scale = _round_scale((high - low) / levels, np.where(two_sided, scale_bits, 11))
    scale = np.where(high > 0, scale, -scale).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        zero = np.where(two_sided, np.clip(np.rint(-low / scale), 0, levels), 0)
    return LinearGrid(scale, zero.astype(np.int32), bits)


def _round_scale(scale: NDArray[np.float64], bits: int | NDArray[Any]) -> _F32:
    """Round to ``bits`` significant bits within f16's range; nonzero scales stay nonzero."""
    exponent = np.frexp(scale)[1]
    step = np.ldexp(1.0, exponent - bits)
    rounded = np.rint(scale / np.maximum(step, _F16_STEP)) * np.maximum(step, _F16_STEP)
    rounded = np.where((scale > 0) & (rounded == 0), _F16_STEP, rounded)
    if np.any(rounded > _F16_MAX):
        raise OverflowError(
            f"a scale of {float(np.max(rounded)):.4g} is beyond f16's largest, {_F16_MAX:.0f}"
        )
    return np.asarray(rounded, np.float32)


def quantize(values: _F32, grid: LinearGrid) -> NDArray[Any]:
    """Nearest codes: int8 for 8 bits, uint8 otherwise; ``values`` and ``grid`` broadcast together."""
    least, greatest = grid.code_range
    # a group without a scale holds only zeros
    divisor = np.where(grid.scale == 0, np.float32(1), grid.scale)
    codes = np.clip(np.rint(values / divisor) + grid.zero, least, greatest)
    return codes.astype(np.int8 if grid.bits == 8 else np.uint8)


def decode(codes: NDArray[Any], grid: LinearGrid) -> _F32:
    """``scale * (code - zero)`` in float32."""
    result: _F32 = grid.scale * (codes.astype(np.int32) - grid.zero).astype(np.float32)
    return result
