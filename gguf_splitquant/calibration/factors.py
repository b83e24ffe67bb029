"""Factors of second moments, two at a time: llama.cpp waits for them, and a factorization uses one core."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from itertools import islice
from typing import Protocol

from ..memory import available_bytes
from ..planning.curves import InputStatistics
from ..refining.metric import Feedback
from ..working_set import METRIC_BYTES


def room_for_two(channels: int) -> bool:
    """Whether two inputs of that width can be factored at a time: in a quarter of the available memory."""
    return 2 * METRIC_BYTES * channels**2 <= available_bytes() // 4


class FactoredStatistics(InputStatistics, Protocol):
    """Second moments that can be factored."""

    def feedback(self, weight: str) -> Feedback:
        """What errors of the weight become."""


class Factors:
    """What errors become at the inputs of weights that are visited in turn.

    Args:
        statistics: of the inputs.
        inputs: their names in the order in which they are needed, nearly: the last two are kept, and those
            that were made ahead until they are needed.
        pool: takes two at a time. Linear algebra has to be held to one thread around it: a factor depends on
            their number (:func:`~..linear_algebra.blas_threads`).
    """

    def __init__(self, statistics: FactoredStatistics, inputs: Sequence[str], pool: Executor) -> None:
        self._statistics = statistics
        self._inputs = inputs
        self._pool = pool
        self._known: dict[str, Feedback] = {}
        self._used: list[str] = []
        self._ahead: set[str] = set()

    def of(self, source: str) -> Feedback:
        """Of one input; with it that of the next one as wide, where there is memory for both."""
        if source not in self._known:
            self._keep(self._used[-1:])
            together = [source, *self._partner(source)]
            made = list(self._pool.map(self._statistics.feedback, together))
            self._known.update(zip(together, made, strict=True))
            self._ahead.update(together[1:])
        self._ahead.discard(source)
        self._keep([*[name for name in self._used if name != source][-1:], source])
        return self._known[source]

    def _keep(self, used: list[str]) -> None:
        self._used = used
        self._known = {n: f for n, f in self._known.items() if n in used or n in self._ahead}

    def _partner(self, source: str) -> list[str]:
        width = len(self._statistics.matrix(source))
        if not room_for_two(width):
            return []
        later = self._inputs[self._inputs.index(source) + 1 :]
        alike = (n for n in later if n not in self._known and len(self._statistics.matrix(n)) == width)
        return list(islice(alike, 1))
