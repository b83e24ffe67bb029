"""What becomes of a weight that is only rounded: ggml's own bytes."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize, quantize

from gguf_splitquant.refining.weights import WeightRefiner


@pytest.mark.parametrize("rows", [1, 64, 130])
def test_rounding_to_bytes_is_that_of_ggml(rows: int) -> None:
    rng = np.random.default_rng(rows)
    weight = (rng.standard_normal((rows, 96)) * np.exp(4 * rng.standard_normal((rows, 1)))).astype(np.float32)
    weight[0, :32] = 0
    weight[0, 32:64] = np.arange(-16, 16) / 2  # halves of a step among them
    weight[0, 32] = 63.5
    weight[-1, 64:] *= np.float32(1e-9)  # a step below the normal halves
    with WeightRefiner(None, 2) as refiner:
        rounded = refiner.round(weight)
    expected = quantize(weight, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(rounded.packed[0], expected)
    difference = weight.astype(np.float64) - dequantize(expected, GGMLQuantizationType.Q8_0)
    assert sum(rounded.errors) == pytest.approx((difference**2).sum(), rel=1e-5)
    assert sum(rounded.powers) == pytest.approx((weight.astype(np.float64) ** 2).sum(), rel=1e-6)
    assert len(rounded.errors) == len(rounded.powers) == -(-rows // 64)
