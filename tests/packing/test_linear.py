"""The reference quantizer: exact zero, half-a-step errors, scales that the file can store."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.packing import decode, fit_grid, quantize

_VALUES = st.floats(-1000, 1000, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


def f32(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)


@settings(max_examples=400, deadline=None)
@given(_VALUES, _VALUES, st.sampled_from([8, 4, 2]), st.sampled_from([7, 9, 11]))
def test_zero_is_exact_and_errors_stay_below_a_step(a: float, b: float, bits: int, scale_bits: int) -> None:
    low, high = min(a, b), max(a, b)
    grid = fit_grid(f32(low), f32(high), bits, scale_bits=scale_bits)
    assert decode(quantize(f32(0), grid), grid) == 0
    values = np.linspace(low, high, 65, dtype=np.float32)
    decoded = decode(quantize(values, grid), grid)
    step = abs(float(grid.scale))
    one_sided = low >= 0 or high <= 0
    # a two-sided grid is shifted to put zero on a code and rounded to few bits: up to half a step at the
    # ends from each, beside the rounding itself
    limit = 0.5 * step if one_sided else step * (1 + 2**bits * 2.0**-scale_bits)
    inside = values if not one_sided else values[np.abs(values) <= np.abs(step) * grid.code_range[1]]
    assert (
        np.max(np.abs(decoded[: len(values)] - values)[np.isin(values, inside)], initial=0) <= limit * 1.001
    )


@settings(max_examples=300, deadline=None)
@given(_VALUES, _VALUES, st.sampled_from([(4, 7), (2, 9)]))
def test_offsets_are_exact_in_f16(a: float, b: float, widths: tuple[int, int]) -> None:
    bits, scale_bits = widths
    grid = fit_grid(f32(min(a, b)), f32(max(a, b)), bits, scale_bits=scale_bits)
    scale = float(grid.scale)
    assert float(np.float16(scale)) == scale
    offset = scale * int(grid.zero)
    assert float(np.float16(offset)) == offset


def test_one_sided_groups_use_every_code_and_no_offset() -> None:
    for low, high in ((-3.0, -1.0), (1.0, 3.0)):
        grid = fit_grid(f32(low), f32(high), 4)
        assert grid.zero == 0
        assert float(decode(np.asarray(15, np.uint8), grid)) == pytest.approx(
            low if low < 0 else high, rel=1e-3
        )


def test_empty_group() -> None:
    grid = fit_grid(f32(0), f32(0), 4)
    assert grid.scale == 0
    np.testing.assert_array_equal(decode(quantize(np.zeros(5, np.float32), grid), grid), np.zeros(5))


def test_tiny_values_keep_a_scale() -> None:
    grid = fit_grid(f32(-1e-9), f32(2e-9), 4)
    assert grid.scale == np.float32(2.0**-24)


def test_values_beyond_f16_are_refused() -> None:
    with pytest.raises(OverflowError, match="65504"):
        fit_grid(f32(0), f32(2e6), 4)
