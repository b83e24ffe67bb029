"""The histogram is the tensor as far as clustering goes, and it is where NaN and Inf are caught."""

from __future__ import annotations

import numpy as np
import pytest

from gguf_splitquant.errors import CheckpointError
from gguf_splitquant.sources.model import FloatType, to_float32
from gguf_splitquant.splitting import ValueHistogram
from gguf_splitquant.splitting.histogram import row_slabs
from tests.sample_models import heavy_tailed, raw_of, tensor_of


@pytest.mark.parametrize("dtype", FloatType)
def test_counts_every_value_once(dtype: FloatType) -> None:
    weights = heavy_tailed(64, 300)
    weights[0, :3] = [0.0, -0.0, 0.0]
    histogram = ValueHistogram.of(tensor_of("w", weights, dtype))
    stored = to_float32(raw_of(weights, dtype), dtype)
    values, counts = np.unique(stored, return_counts=True)
    assert histogram.exact
    np.testing.assert_array_equal(histogram.values, values)
    np.testing.assert_array_equal(histogram.counts, counts)


def test_large_f32_tensors_are_binned_without_losing_mass() -> None:
    weights = heavy_tailed(1025, 1025)
    histogram = ValueHistogram.of(tensor_of("w", weights, FloatType.F32))
    assert not histogram.exact
    assert histogram.counts.sum() == weights.size
    assert np.all(np.diff(histogram.values) > 0)
    total = float(np.sum(histogram.values * histogram.counts))
    assert total == pytest.approx(float(weights.sum(dtype=np.float64)), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", FloatType)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_names_the_tensor_and_the_place_of_a_bad_value(dtype: FloatType, value: float) -> None:
    weights = heavy_tailed(8, 32)
    weights[5, 7] = weights[6, 1] = value
    with pytest.raises(CheckpointError, match=r"blk\.3\.ffn_up\.weight: .* 2 of 256 .*\[5, 7\]"):
        ValueHistogram.of(tensor_of("blk.3.ffn_up.weight", weights, dtype))


def test_slabs_cover_the_rows_once() -> None:
    tensor = tensor_of("w", heavy_tailed(10, 32))
    slabs = list(row_slabs(tensor, slab_values=100))
    assert [first for first, _ in slabs] == [0, 3, 6, 9]
    np.testing.assert_array_equal(np.concatenate([raw for _, raw in slabs]), tensor.read())
