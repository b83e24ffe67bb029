"""The figures against scipy and against cases that can be worked out by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import rel_entr, softmax

from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation.divergence import TokenScores, half_interval, log_softmax, score, summarize


def logits_of(seed: int, rows: int, vocabulary: int, scale: float) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(rows, vocabulary)) * scale).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 20),
    vocabulary=st.integers(2, 300),
    scale=st.floats(0.01, 30),
    noise=st.floats(0, 30),
)
def test_against_scipy(seed: int, rows: int, vocabulary: int, scale: float, noise: float) -> None:
    base = logits_of(seed, rows, vocabulary, scale)
    other = base + logits_of(seed + 1, rows, vocabulary, noise)
    targets = np.random.default_rng(seed).integers(0, vocabulary, rows).astype(np.int32)
    scores = score(base, other, targets)
    p, q = softmax(base.astype(np.float64), axis=1), softmax(other.astype(np.float64), axis=1)
    np.testing.assert_allclose(scores.kld, rel_entr(p, q).sum(axis=1), rtol=1e-9, atol=1e-13)
    rows_index = np.arange(rows)
    np.testing.assert_allclose(scores.nll_base, -np.log(p[rows_index, targets]), atol=1e-10)
    np.testing.assert_allclose(scores.nll, -np.log(q[rows_index, targets]), atol=1e-10)
    assert scores.same_top.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    exact = base.astype(np.float64) - other
    np.testing.assert_allclose(scores.logit_max, np.abs(exact).max(axis=1))
    np.testing.assert_allclose(scores.logit_square, (exact**2).mean(axis=1))


def test_tiny_divergences_are_not_rounded_away() -> None:
    # for q = p * (1 + e) on a uniform p, KLD = e^2 / 2 to first order
    base = np.zeros((1, 1024), np.float32)
    other = base.copy()
    other[0, ::2] += np.float32(2e-5)
    expected = (1e-5) ** 2 / 2
    assert score(base, other, np.zeros(1, np.int32)).kld[0] == pytest.approx(expected, rel=1e-4)
    assert score(base, base, np.zeros(1, np.int32)).kld[0] == 0


def test_masked_logits_do_not_count() -> None:
    base = np.array([[0.0, 1.0, -np.inf]], np.float32)
    other = np.array([[0.5, 1.0, -np.inf]], np.float32)
    reduced = score(base[:, :2].copy(), other[:, :2].copy(), np.zeros(1, np.int32))
    assert score(base, other, np.zeros(1, np.int32)).kld == pytest.approx(reduced.kld)


def test_log_softmax_of_huge_logits() -> None:
    np.testing.assert_allclose(log_softmax(np.array([[3e38, 0.0]], np.float32)), [[0.0, -3e38]], rtol=1e-6)
    np.testing.assert_allclose(log_softmax(np.full((1, 4), 1e30, np.float32)), math.log(0.25))


def scores_of(kld: np.ndarray, **more: np.ndarray) -> TokenScores:
    zero = np.zeros(len(kld))
    fields = {f.name: zero for f in dataclasses.fields(TokenScores)}
    return TokenScores(**(fields | {"kld": kld} | more))


def test_summary() -> None:
    kld = np.linspace(0, 1, 1001)
    nll_base = np.full(1001, math.log(4.0))
    figures = summarize(
        scores_of(
            kld,
            nll_base=nll_base,
            nll=nll_base + math.log(2),
            same_top=(np.arange(1001) % 4 == 0).astype(float),
            logit_max=np.arange(1001.0),
            logit_square=np.full(1001, 9.0),
        )
    )
    assert (figures.kld_mean, figures.kld_median, figures.kld_max) == pytest.approx((0.5, 0.5, 1.0))
    assert (figures.kld_p90, figures.kld_p99, figures.kld_p999) == pytest.approx((0.9, 0.99, 0.999))
    assert figures.top1 == pytest.approx(251 / 1001)
    assert (figures.ppl_base, figures.ppl, figures.ppl_ratio) == pytest.approx((4, 8, 2))
    assert figures.ppl_ratio_error == pytest.approx(0, abs=1e-12)
    assert (figures.logit_max, figures.logit_rms) == (1000, 3)
    assert figures.kld_error == pytest.approx(1.96 * kld.std(ddof=1) / math.sqrt(1001))


def test_positions_that_are_not_finite_are_counted_and_left_out() -> None:
    base = logits_of(0, 6, 50, 3.0)
    other = logits_of(1, 6, 50, 3.0)
    targets = np.arange(6, dtype=np.int32)
    clean = summarize(score(base[[0, 2, 3, 5]], other[[0, 2, 3, 5]], targets[[0, 2, 3, 5]]))
    other[1, 7] = np.nan
    base[4, 3] = np.inf
    broken = summarize(score(base, other, targets))
    assert broken.non_finite == 2
    assert dataclasses.replace(broken, non_finite=0) == clean
    with pytest.raises(EvaluationError, match="none of 6 positions is finite"):
        summarize(score(base, np.full_like(base, np.nan), targets))


def test_interval_of_too_few_values() -> None:
    assert half_interval(np.array([1.0])) == math.inf


def test_a_destroyed_model_has_an_infinite_perplexity_and_no_warning() -> None:
    assert summarize(scores_of(np.ones(3), nll=np.full(3, 1e6))).ppl == math.inf
