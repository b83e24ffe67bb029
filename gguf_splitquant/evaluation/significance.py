"""Is a difference between two scores more than chance? Intervals and the paired test for right and wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Z_95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: a two-sided interval of 95 %."""


def wilson_interval(successes: int, trials: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval for a proportion (Wilson 1927): never leaves [0, 1], sound for few trials.

    Raises:
        ValueError: no trials, or more successes than trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} successes in {trials} trials")
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    middle = share + z * z / (2 * trials)
    scale = 1 + z * z / trials
    # at 0 and at all the bound is exact; rounding would put it at 1e-18
    low = 0.0 if successes == 0 else (middle - spread) / scale
    high = 1.0 if successes == trials else (middle + spread) / scale
    return low, high


@dataclass(frozen=True)
class PairedTest:
    """McNemar's test of two models on the same questions.

    Attributes:
        gained: questions that only the second model answers rightly.
        lost: questions that only the first does.
        p: probability of a split at least as uneven if neither were better (exact, two-sided).
    """

    gained: int
    lost: int
    p: float


def mcnemar(first: Sequence[bool], second: Sequence[bool]) -> PairedTest:
    """The exact (binomial) form of McNemar's test (1947): only questions that differ carry information.

    Args:
        first, second: whether each question was answered rightly, in the same order.
    """
    pairs = list(zip(first, second, strict=True))
    gained = sum(b and not a for a, b in pairs)
    lost = sum(a and not b for a, b in pairs)
    discordant = gained + lost
    # integers: at a thousand discordant questions 2**-n is beyond float64
    tail = sum(math.comb(discordant, i) for i in range(min(gained, lost) + 1))
    return PairedTest(gained, lost, min(1.0, 2 * tail / 2**discordant))
