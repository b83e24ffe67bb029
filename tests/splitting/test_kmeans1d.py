"""The clustering must be the global optimum: checked by enumeration, and against scikit-learn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from gguf_splitquant.splitting import kmeans1d


def inertia(values: np.ndarray, counts: np.ndarray, centres: np.ndarray) -> float:
    nearest = np.abs(values[:, None] - centres).min(axis=1)
    return float(np.sum(counts * nearest**2))


def best_by_enumeration(values: np.ndarray, counts: np.ndarray, k: int) -> float:
    least = np.inf
    for cuts in itertools.combinations(range(1, values.size), k - 1):
        edges = [0, *cuts, values.size]
        centres = [np.average(values[a:b], weights=counts[a:b]) for a, b in itertools.pairwise(edges)]
        least = min(least, inertia(values, counts, np.array(centres)))
    return least


@settings(max_examples=200, deadline=None)
@given(
    # sixteenths: sums of squares stay exact, so that a tie is a tie
    st.lists(st.integers(-1600, 1600).map(lambda n: n / 16), min_size=1, max_size=11, unique=True),
    st.integers(1, 8),
    st.randoms(use_true_random=False),
)
def test_is_the_global_optimum(raw: list[float], k: int, random) -> None:
    values = np.unique(np.array(raw, np.float64))
    counts = np.array([random.randint(1, 50) for _ in values], np.int64)
    centres = kmeans1d(values, counts, k)
    assert centres.size == min(k, values.size)
    assert np.all(np.diff(centres) > 0)
    if k <= values.size:
        least = best_by_enumeration(values, counts, k)
        scale = float(np.sum(counts * (values - values.mean()) ** 2))
        assert inertia(values, counts, centres) <= least + 1e-9 * scale


@pytest.mark.parametrize("k", [1, 2, 3, 5, 8])
def test_never_worse_than_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    weights = (rng.standard_t(4, 100_000) * 0.02).astype(np.float16)
    values, counts = np.unique(weights.astype(np.float64), return_counts=True)
    peer = KMeans(k, n_init=2, random_state=0).fit(values[:, None], sample_weight=counts)
    ours = inertia(values, counts, kmeans1d(values, counts, k))
    assert ours <= peer.inertia_ * (1 + 1e-9)
    # scikit-learn finds a local optimum: started from ours it must find nothing better either
    again = KMeans(k, init=kmeans1d(values, counts, k)[:, None], n_init=1).fit(
        values[:, None], sample_weight=counts
    )
    assert again.inertia_ >= ours * (1 - 1e-9)


def test_values_far_from_zero_keep_their_digits() -> None:
    values = 1e6 + np.array([0.0, 0.001, 0.5, 0.501])
    centres = kmeans1d(values, np.ones(4, np.int64), 2)
    np.testing.assert_allclose(centres - 1e6, [0.0005, 0.5005], atol=1e-8)


@pytest.mark.parametrize(
    ("values", "k"),
    [(np.array([]), 1), (np.array([1.0]), 0), (np.array([2.0, 1.0]), 1), (np.array([1.0, 1.0]), 1)],
)
def test_refuses_what_is_not_a_histogram(values: np.ndarray, k: int) -> None:
    with pytest.raises(ValueError):
        kmeans1d(values, np.ones(values.size, np.int64), k)
