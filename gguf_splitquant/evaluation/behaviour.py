"""Where a file behaves unlike its baseline, not only how far it is on average.

A mean over thousands of tokens hides a file that is right nearly everywhere and wrong on purpose in one
place: weights can be made so that a known quantizer plants behaviour that the float model does not have
(Egashira et al., arXiv 2405.18137, 2505.23786). So the comparison also counts positions where the baseline is
sure of one token and the file is sure of another, and keeps the place where the two differ most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .divergence import TokenScores, log_softmax

SURE = 0.5
"""Probability from which on a model counts as sure: then no other token is as likely."""

_CONTEXT = 24
"""Tokens shown before a place."""


@dataclass(frozen=True)
class Choice:
    """A model's most likely next token: as text, and its probability."""

    token: str
    probability: float


@dataclass(frozen=True)
class Place:
    """One position of the text.

    Attributes:
        chunk, position: from 0; the token at ``position`` is the last that was read.
        context: the text just before.
        kld: divergence there, in nats.
        base, quant: what the two models would go on with.
    """

    chunk: int
    position: int
    context: str
    kld: float
    base: Choice
    quant: Choice


@dataclass(frozen=True)
class Behaviour:
    """What :class:`BehaviourWatch` saw.

    Attributes:
        tokens: positions looked at.
        sure: positions where the baseline is sure.
        flips: those of them where the file is sure of another token.
        flip_rate: flips / tokens.
        worst: the place of the largest divergence; None if no position has finite logits.
        worst_flip: the place of the largest divergence among the flips; None without any.
    """

    tokens: int
    sure: int
    flips: int
    flip_rate: float
    worst: Place | None
    worst_flip: Place | None


@dataclass(frozen=True)
class _Spot:
    chunk: int
    position: int
    kld: float
    tokens: tuple[int, int]
    probabilities: tuple[float, float]


class BehaviourWatch:
    """Looks at two models' logits, slab by slab, and remembers counts and two places."""

    def __init__(self) -> None:
        self._tokens = self._sure = self._flips = 0
        self._worst: _Spot | None = None
        self._worst_flip: _Spot | None = None

    def see(
        self,
        base: NDArray[np.float32],
        other: NDArray[np.float32],
        scores: TokenScores,
        chunk: int,
        start: int,
    ) -> None:
        """Take in some positions of one chunk.

        Args:
            base, other: logits, (positions, vocabulary); more rows than scores are left out.
            scores: of these positions.
            chunk: its number.
            start: position of the first row in the chunk.
        """
        count = len(scores)
        rows = np.arange(count)
        choices = base[:count].argmax(axis=-1), other[:count].argmax(axis=-1)
        with np.errstate(all="ignore"):
            sizes = [
                np.exp(log_softmax(logits[:count])[rows, chosen])
                for logits, chosen in zip((base, other), choices, strict=True)
            ]
            sure = sizes[0] >= SURE
            flips = sure & (sizes[1] >= SURE) & (choices[0] != choices[1])
        self._tokens += count
        self._sure += int(sure.sum())
        self._flips += int(flips.sum())

        def largest(among: NDArray[Any], best: _Spot | None) -> _Spot | None:
            divergence = np.where(among & np.isfinite(scores.kld), scores.kld, -1.0)
            i = int(divergence.argmax()) if count else 0
            if not count or divergence[i] < 0 or (best is not None and divergence[i] <= best.kld):
                return best
            tokens = int(choices[0][i]), int(choices[1][i])
            return _Spot(
                chunk, start + i, float(divergence[i]), tokens, (float(sizes[0][i]), float(sizes[1][i]))
            )

        self._worst = largest(np.ones(count, bool), self._worst)
        self._worst_flip = largest(flips, self._worst_flip)

    def summary(
        self, chunks: NDArray[np.int32], text_of: Callable[[Sequence[int] | NDArray[np.int32]], str]
    ) -> Behaviour:
        """What was seen.

        Args:
            chunks: tokens that were read, (chunks, context).
            text_of: turns tokens into text.
        """

        def place(spot: _Spot | None) -> Place | None:
            if spot is None:
                return None
            before = chunks[spot.chunk, max(0, spot.position + 1 - _CONTEXT) : spot.position + 1]
            base, quant = (
                Choice(text_of([token]), probability)
                for token, probability in zip(spot.tokens, spot.probabilities, strict=True)
            )
            return Place(spot.chunk, spot.position, text_of(before), spot.kld, base, quant)

        rate = self._flips / self._tokens if self._tokens else 0.0
        return Behaviour(
            self._tokens, self._sure, self._flips, rate, place(self._worst), place(self._worst_flip)
        )
