"""Sampling: the token that plain inversion of the cumulative distribution gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.calibration.own_text import OwnText, _sample


@pytest.mark.parametrize(
    ("size", "length"), [(270_000_000, 384), (1_300_000_000, 295), (2_500_000_000, 192), (10**12, 192)]
)
def test_large_models_write_shorter_texts(size: int, length: int) -> None:
    assert OwnText().length_for(size) == length
    assert OwnText(sequences=8).length_for(1_300_000_000) == 384


@given(
    vocabulary=st.integers(1, 1100),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    spread=st.sampled_from([0.0, 3.0, 60.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_draws_what_inverting_the_whole_cumulative_distribution_draws(
    vocabulary: int, temperature: float, spread: float, seed: int
) -> None:
    logits = np.random.default_rng(seed).standard_normal((8, vocabulary)).astype(np.float32) * spread
    drawn = _sample(logits, np.full((len(logits), 1), temperature, np.float32), np.random.default_rng(seed))
    points = np.random.default_rng(seed).random(8)
    weights = np.exp((logits - logits.max(axis=1, keepdims=True)).astype(np.float64) / temperature)
    cumulative = np.cumsum(weights, axis=1) / weights.sum(axis=1, keepdims=True)
    for row, token, point in zip(cumulative, drawn, points, strict=True):
        below = row[token - 1] if token else 0.0
        # single precision moves a boundary by a millionth
        assert below - 1e-5 <= point <= row[token] + 1e-5
