"""The value split of SplitQuantV2: disjoint clusters, midpoint boundaries, an exact sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gguf_splitquant.sources.model import FloatType, to_float32
from gguf_splitquant.splitting import ValueHistogram, ValueSplit, fit_value_split, float_sub_layers, kmeans1d
from tests.sample_models import heavy_tailed, raw_of, tensor_of


def fit(weights: np.ndarray, k: int, dtype: FloatType = FloatType.F32) -> ValueSplit:
    tensor = tensor_of("w", weights, dtype)
    return fit_value_split(tensor, ValueHistogram.of(tensor), k)


@settings(max_examples=150, deadline=None)
@given(
    hnp.arrays(
        np.float32, st.tuples(st.integers(1, 6), st.integers(1, 9)), elements=st.floats(-4, 4, width=32)
    ),
    st.integers(1, 8),
)
def test_float_sum_is_the_original_bit_for_bit(weights: np.ndarray, k: int) -> None:
    layers = float_sub_layers(weights, fit(weights, k))
    for order in (layers, layers[::-1]):
        total = order[0]
        for layer in order[1:]:
            total = total + layer
        np.testing.assert_array_equal(total.view(np.uint32), weights.view(np.uint32))
    assert sum((layer != 0).astype(int) for layer in layers).max(initial=0) <= 1


@pytest.mark.parametrize("dtype", FloatType)
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_clusters_meet_at_the_midpoints_of_the_centres(k: int, dtype: FloatType) -> None:
    weights = heavy_tailed(128, 96)
    tensor = tensor_of("w", weights, dtype)
    histogram = ValueHistogram.of(tensor)
    centres = kmeans1d(histogram.values, histogram.counts, k)
    split = fit(weights, k, dtype)
    values = to_float32(raw_of(weights, dtype), dtype)
    nearest = np.abs(values[..., None].astype(np.float64) - centres).argmin(axis=-1)
    for cluster in range(k):
        np.testing.assert_array_equal(split.members(values, cluster), nearest == cluster)
        assert split.lows[cluster] == values[nearest == cluster].min()
        assert split.highs[cluster] == values[nearest == cluster].max()


def test_large_f32_split_agrees_with_the_exact_one() -> None:
    weights = heavy_tailed(1100, 1000)
    values, counts = np.unique(weights.astype(np.float64), return_counts=True)
    exact = kmeans1d(values, counts, 3)
    split = fit(weights, 3)
    np.testing.assert_allclose(split.boundaries, (exact[:-1] + exact[1:]) / 2, rtol=2e-3)
    members = np.stack([split.members(weights, c) for c in range(3)])
    assert (members.sum(axis=0) == 1).all()


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_fewer_distinct_values_than_clusters(value: float) -> None:
    split = fit(np.full((4, 32), value, np.float32), 3)
    assert split.k == 1
    assert (split.lows[0], split.highs[0]) == (value, value)
