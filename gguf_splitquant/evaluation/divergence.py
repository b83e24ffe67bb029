"""What two models' logits for the same text say about each other, token by token.

Everything is computed in float64 from the float32 logits: for files that are nearly equal the divergence is
a small difference of large sums. Only a few numbers per token are kept, never logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EvaluationError

Values = NDArray[np.float64]

_ROWS = 8
"""Rows in work at a time: the float64 copies stay in the cache of the processor."""


@dataclass(frozen=True)
class TokenScores:
    """Per scored token, 1-D float64 arrays of the same length.

    Attributes:
        kld: Kullback-Leibler divergence KL(base || other) of the next-token distributions, in nats.
        nll_base, nll: negative log-likelihood of the token that follows, by base and by the other, in nats.
        same_top: 1 where both models' most likely token is the same, else 0.
        logit_max: largest absolute difference of two logits.
        logit_square: mean over the vocabulary of the squared difference of logits.
    """

    kld: Values
    nll_base: Values
    nll: Values
    same_top: Values
    logit_max: Values
    logit_square: Values

    def __len__(self) -> int:
        return len(self.kld)

    @classmethod
    def concatenate(cls, parts: Iterable[TokenScores]) -> TokenScores:
        """All parts, in order."""
        parts = list(parts)
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def finite(self) -> tuple[TokenScores, int]:
        """Without the tokens where a model answered NaN or infinity, and how many those were: one broken
        position must be reported, and must not turn every mean into NaN."""
        good = np.all([np.isfinite(getattr(self, f.name)) for f in fields(self)], axis=0)
        kept = TokenScores(*(getattr(self, f.name)[good] for f in fields(self)))
        return kept, int(np.count_nonzero(~good))


def log_softmax(logits: NDArray[Any]) -> Values:
    """Log-probabilities in float64, same shape; softmax over the last axis."""
    values = logits.astype(np.float64)
    values -= values.max(axis=-1, keepdims=True)
    values -= np.log(np.exp(values).sum(axis=-1, keepdims=True))
    return values


def score(base: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.int32]) -> TokenScores:
    """Compare two models' logits.

    Args:
        base, other: shape ``(tokens, vocabulary)``.
        targets: the token that really follows each position, shape ``(tokens,)``.
    """
    parts = []
    for start in range(0, len(targets), _ROWS):
        rows = slice(start, start + _ROWS)
        parts.append(_score_rows(base[rows], other[rows], targets[rows]))
    return TokenScores.concatenate(parts)


def _score_rows(
    base: NDArray[np.float32], other: NDArray[np.float32], targets: NDArray[np.int32]
) -> TokenScores:
    # NaN and infinity are counted afterwards (TokenScores.finite), not warned about here
    with np.errstate(all="ignore"):
        log_p, log_q = log_softmax(base), log_softmax(other)
        difference = base.astype(np.float64) - other
        rows = np.arange(len(targets))
        # masked logits (-inf in both) have probability 0 and contribute nothing
        terms = np.where(np.isneginf(log_p), 0.0, np.exp(log_p) * (log_p - log_q))
        return TokenScores(
            # rounding can leave -1e-17 for equal models
            kld=np.maximum(terms.sum(axis=-1), 0.0),
            nll_base=-log_p[rows, targets],
            nll=-log_q[rows, targets],
            same_top=(base.argmax(axis=-1) == other.argmax(axis=-1)).astype(np.float64),
            logit_max=np.abs(difference).max(axis=-1),
            logit_square=np.square(difference).mean(axis=-1),
        )


@dataclass(frozen=True)
class Divergence:
    """Summary of :class:`TokenScores` over a text.

    Attributes:
        tokens: scored tokens with finite logits.
        non_finite: tokens left out because a model answered NaN or infinity.
        kld_mean, kld_error: mean, and half of its 95 % confidence interval (independent tokens).
        kld_median, kld_p90, kld_p99, kld_p999, kld_max: quantiles.
        top1: share of tokens where the most likely token is the same.
        ppl_base, ppl: perplexities.
        ppl_ratio, ppl_ratio_error: ppl / ppl_base, and half of its 95 % interval from paired tokens.
        logit_max, logit_rms: largest and root mean square difference of logits.
    """

    tokens: int
    non_finite: int
    kld_mean: float
    kld_error: float
    kld_median: float
    kld_p90: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    top1: float
    ppl_base: float
    ppl: float
    ppl_ratio: float
    ppl_ratio_error: float
    logit_max: float
    logit_rms: float


def summarize(scores: TokenScores) -> Divergence:
    """Reduce to figures.

    Raises:
        EvaluationError: no token has finite logits.
    """
    good, non_finite = scores.finite()
    if len(good) == 0:
        raise EvaluationError(
            "logits", f"none of {len(scores)} positions is finite", "the model file is damaged: make it again"
        )
    quantiles = np.quantile(good.kld, [0.5, 0.9, 0.99, 0.999])
    ratio = good.nll - good.nll_base
    ppl_ratio = _exp(float(ratio.mean()))
    return Divergence(
        tokens=len(good),
        non_finite=non_finite,
        kld_mean=float(good.kld.mean()),
        kld_error=half_interval(good.kld),
        kld_median=float(quantiles[0]),
        kld_p90=float(quantiles[1]),
        kld_p99=float(quantiles[2]),
        kld_p999=float(quantiles[3]),
        kld_max=float(good.kld.max()),
        top1=float(good.same_top.mean()),
        ppl_base=_exp(float(good.nll_base.mean())),
        ppl=_exp(float(good.nll.mean())),
        ppl_ratio=ppl_ratio,
        ppl_ratio_error=ppl_ratio * half_interval(ratio),
        logit_max=float(good.logit_max.max()),
        logit_rms=float(np.sqrt(good.logit_square.mean())),
    )


def half_interval(values: Values) -> float:
    """Half of the 95 % confidence interval of the mean of independent values; infinite for fewer than two."""
    if len(values) < 2:
        return float("inf")
    return float(1.96 * values.std(ddof=1) / np.sqrt(len(values)))


def _exp(value: float) -> float:
    # a destroyed model has a perplexity beyond float64 only if something is very wrong; say inf, do not raise
    with np.errstate(over="ignore"):
        return float(np.exp(value))
