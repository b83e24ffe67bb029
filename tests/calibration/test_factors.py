"""Inputs are factored two at a time, and forgotten when they have served."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np
import pytest
from numpy.typing import NDArray

from gguf_splitquant.calibration import factors as module
from gguf_splitquant.calibration.factors import Factors
from gguf_splitquant.planning.curves import Salience
from gguf_splitquant.refining.metric import Feedback

WIDTHS = {"0.attn": 8, "0.down": 16, "1.attn": 8, "1.down": 16, "2.attn": 8}


class Inputs:
    """Second moments of some inputs, and which of them were factored."""

    sensitivity: Mapping[str, float] = {}

    def __init__(self) -> None:
        self.factored: list[str] = []

    def input_of(self, weight: str) -> str:
        return weight

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float32]:
        return np.full(WIDTHS[weight], 1.0 + list(WIDTHS).index(weight), np.float32)

    def feedback(self, weight: str) -> Feedback:
        self.factored.append(weight)
        return Feedback.of(self.matrix(weight))

    def salience(self, weight: str) -> Salience:
        return self.feedback(weight).salience

    def experts(self, weight: str) -> None:
        return None


@pytest.fixture
def pool() -> Iterator[Executor]:
    with ThreadPoolExecutor(1) as pool:  # one thread: the order is known
        yield pool


def test_the_next_input_as_wide_is_factored_too(pool: Executor) -> None:
    inputs = Inputs()
    factors = Factors(inputs, list(WIDTHS), pool)
    for name in WIDTHS:
        for _ in range(2):
            np.testing.assert_array_equal(factors.of(name).spread, Feedback.of(inputs.matrix(name)).spread)
    assert inputs.factored == ["0.attn", "1.attn", "0.down", "1.down", "2.attn"]


def test_the_last_two_are_kept(pool: Executor) -> None:
    inputs = Inputs()
    factors = Factors(inputs, list(WIDTHS), pool)
    for name in ("0.attn", "0.down", "0.attn", "0.down", "1.attn"):
        factors.of(name)
    assert inputs.factored == ["0.attn", "1.attn", "0.down", "1.down"]
    factors.of("0.attn")
    assert inputs.factored[4:] == ["0.attn", "2.attn"]


def test_one_at_a_time_where_memory_is_short(pool: Executor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 4 * 2 * 17 * 8 * 8)  # a quarter: two of 8 channels
    inputs = Inputs()
    factors = Factors(inputs, list(WIDTHS), pool)
    factors.of("0.attn")
    assert inputs.factored == ["0.attn", "1.attn"]
    factors.of("0.down")
    assert inputs.factored == ["0.attn", "1.attn", "0.down"]
