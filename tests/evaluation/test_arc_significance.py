"""Intervals and p-values against SciPy: a wrong one would call noise a difference."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from gguf_splitquant.evaluation.significance import mcnemar, wilson_interval


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(case: tuple[int, int]) -> None:
    successes, trials = case
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    low, high = wilson_interval(successes, trials)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_what_is_no_proportion(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {trials} trials"):
        wilson_interval(successes, trials)


@given(st.integers(0, 900), st.integers(0, 900))
def test_mcnemar_equals_scipys_binomial_test(gained: int, lost: int) -> None:
    first = [False] * gained + [True] * lost + [True, False]
    second = [True] * gained + [False] * lost + [True, False]
    test = mcnemar(first, second)
    assert (test.gained, test.lost) == (gained, lost)
    expected = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert test.p == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_needs_the_same_questions() -> None:
    with pytest.raises(ValueError, match="argument 2 is"):
        mcnemar([True], [True, False])
