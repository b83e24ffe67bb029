"""The float model's distributions, small enough to keep, so that it runs once for many files.

llama-perplexity keeps 16 bits for every token of the vocabulary. Here a position keeps its most likely
tokens exactly (to 16 bits in log-probability), and of the others, the tail, its mass and a random sample.
With T the tail, P and Q its masses, and w = (q/p) / (Q/P) on it,

    KL(p || q) = sum over the top of p log(p/q) + P log(P/Q) + P E[-log w | token drawn from p on T]

where the last term, the divergence within the tail, is estimated from the sample. E[w] is known to be 1, so
w serves as a control variate: for files that are close to the baseline the sampling error vanishes to second
order, as the divergence does. Only sampling and 16-bit rounding are lost.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError
from .divergence import TokenScores, Values, log_softmax

FORMAT_VERSION = 1
TAIL_SAMPLE = 256
"""Tokens drawn from the tail of each position."""
TOP_SHARE = 40
"""One of so many tokens of the vocabulary is kept exactly."""
_STEPS = 65535


@dataclass(frozen=True)
class BaselineRows:
    """What is kept of consecutive positions of the float model; the first axis of all arrays is the position.

    Attributes:
        top: ids of the most likely tokens, most likely first; uint16 or uint32, shape ``(n, top)``.
        top_codes: their log-probabilities in steps of ``scale`` below the first one's, uint16.
        tail: ids drawn from the others in proportion to their probability; shape ``(n, sample)``.
        tail_codes: log-probabilities of these, in the same steps.
        best: log-probability of the most likely token, float32.
        scale: step of the codes in nats, float32.
        tail_log_mass: log of the summed probability of all tokens that are not in ``top``, float32.
        nll: negative log-likelihood of the token that follows, float64.
    """

    top: NDArray[Any]
    top_codes: NDArray[np.uint16]
    tail: NDArray[Any]
    tail_codes: NDArray[np.uint16]
    best: NDArray[np.float32]
    scale: NDArray[np.float32]
    tail_log_mass: NDArray[np.float32]
    nll: Values

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(getattr(self, f.name).nbytes for f in dataclasses.fields(self))


def compress(
    logits: NDArray[np.float32], targets: NDArray[np.int32], seed: int | Sequence[int]
) -> BaselineRows:
    """Keep the essence of the float model's logits.

    Args:
        logits: shape ``(n, vocabulary)``, finite.
        targets: the token that really follows each position.
        seed: of the tail's sample; the same for the same position in every run.
    """
    vocabulary = logits.shape[1]
    n_top = max(1, vocabulary // TOP_SHARE)
    random = np.random.default_rng(seed)
    parts: dict[str, list[Any]] = {f.name: [] for f in dataclasses.fields(BaselineRows)}
    for row, target in zip(logits, targets, strict=True):
        # a row with NaN or infinity stays recognizable: what is kept of it is NaN
        with np.errstate(all="ignore"):
            kept = _compress_row(row, int(target), n_top, random)
        for name, value in kept.items():
            parts[name].append(value)
    return BaselineRows(**{name: np.array(values) for name, values in parts.items()})


def _compress_row(
    row: NDArray[np.float32], target: int, n_top: int, random: np.random.Generator
) -> dict[str, Any]:
    vocabulary = len(row)
    ids = np.uint16 if vocabulary <= 1 << 16 else np.uint32
    log_p = log_softmax(row)
    chosen = np.argpartition(-row, n_top - 1)[:n_top]
    top = chosen[np.argsort(-row[chosen], kind="stable")]
    tail_p = np.exp(log_p)
    tail_p[top] = 0.0
    cumulative = np.cumsum(tail_p)
    # systematic sampling: evenly spaced through the tail's mass, from one random start
    points = (np.arange(TAIL_SAMPLE) + random.random()) / TAIL_SAMPLE * cumulative[-1]
    tail = np.minimum(np.searchsorted(cumulative, points, side="right"), vocabulary - 1)
    best = log_p[top[0]]
    # beyond e-700 nothing is left of a probability, and masked tokens have none at all
    deepest = min(best - min(log_p[top].min(), log_p[tail].min()), 700.0)
    scale = np.float32(max(deepest / _STEPS, 1e-30))
    return {
        "top": top.astype(ids),
        "top_codes": _codes(log_p[top], best, scale),
        "tail": tail.astype(ids),
        "tail_codes": _codes(log_p[tail], best, scale),
        "best": np.float32(best),
        "scale": scale,
        "tail_log_mass": np.float32(np.log(max(cumulative[-1], 1e-300))),
        "nll": -log_p[target],
    }


def score_against(base: BaselineRows, logits: NDArray[np.float32], targets: NDArray[np.int32]) -> TokenScores:
    """Compare a model's logits with the kept baseline. Logits themselves are not kept, so ``logit_max`` and
    ``logit_square`` of the result are zero and mean nothing.

    Args:
        base: of the same positions.
        logits: shape ``(n, vocabulary)``.
        targets: the token that really follows each position.
    """
    n = len(targets)
    kld = np.empty(n)
    nll = np.empty(n)
    with np.errstate(all="ignore"):
        for i in range(n):
            log_q = log_softmax(logits[i])
            nll[i] = -log_q[targets[i]]
            kld[i] = _divergence(base, i, log_q)
    same_top = (base.top[:, 0] == logits.argmax(axis=-1)).astype(np.float64)
    zero = np.zeros(n)
    return TokenScores(
        kld=kld, nll_base=base.nll, nll=nll, same_top=same_top, logit_max=zero, logit_square=zero
    )


def _divergence(base: BaselineRows, i: int, log_q: Values) -> float:
    scale = float(base.scale[i])
    log_p = float(base.best[i]) - scale * base.top_codes[i]
    log_tail = float(base.tail_log_mass[i])
    # rounding must not leave a distribution whose sum is not one: the error would be of first order
    log_sum = np.log(np.exp(log_p).sum() + np.exp(log_tail))
    log_p -= log_sum
    log_tail -= log_sum
    q_top = log_q[base.top[i]]
    log_q_tail = np.log(max(_tail_mass(log_q, base.top[i], q_top), 1e-300))
    tail_mass = np.exp(log_tail)
    log_ratio = log_q[base.tail[i]] - (float(base.best[i]) - scale * base.tail_codes[i] - log_sum)
    log_ratio -= log_q_tail - log_tail
    within = _mean_minus_log(log_ratio)
    kld = np.sum(np.exp(log_p) * (log_p - q_top)) + tail_mass * (log_tail - log_q_tail + within)
    # NaN stays NaN, to be counted
    return float(kld if not kld < 0 else 0.0)


def _tail_mass(log_q: Values, top: NDArray[Any], log_q_top: Values) -> float:
    """Probability of all tokens but ``top``."""
    mass = 1.0 - float(np.exp(log_q_top).sum())
    if mass > 1e-6:
        return mass
    # the difference of two near-ones has lost its digits
    rest = np.exp(log_q)
    rest[top] = 0.0
    return float(rest.sum())


def _mean_minus_log(log_w: Values) -> float:
    """Mean of -log w from a sample, for w whose true mean is known to be one.

    The sample's error in the mean of w tells its error in the mean of log w, by the coefficient that is right
    for a log-normal w. (Regression on the sample itself would be biased where w has a heavy tail.)
    """
    variance = float(log_w.var())
    # v / (exp(v) - 1): 1 for files close to the baseline, 0 for destroyed ones
    coefficient = variance / float(np.expm1(variance)) if 0 < variance < 700 else float(variance == 0)
    excess = float(np.expm1(log_w).mean()) if coefficient else 0.0
    return float(coefficient * excess - log_w.mean())


def _codes(log_p: Values, best: float, scale: np.float32) -> NDArray[np.uint16]:
    return np.rint(np.clip((best - log_p) / float(scale), 0, _STEPS)).astype(np.uint16)


class BaselineCache:
    """Baselines of a text's chunks in a folder, one file per chunk: an interrupted run keeps what it has.

    Args:
        folder: for these chunks alone; named by the caller after all that determines them.
        head: what determines them, stored for people.
    """

    def __init__(self, folder: Path, head: dict[str, Any]) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "head.json").write_text(json.dumps(head, indent=2), encoding="utf-8")
        except OSError as error:
            raise OutputError(folder, f"cannot write: {error.strerror}", "choose another folder") from error

    def __contains__(self, chunk: int) -> bool:
        return self._path(chunk).exists()

    def store(self, chunk: int, rows: BaselineRows) -> None:
        """Keep a chunk; it appears only when it is complete."""
        partial = self._path(chunk).with_suffix(f".{os.getpid()}.part")
        try:
            with partial.open("wb") as file:
                np.savez(file, **{f.name: getattr(rows, f.name) for f in dataclasses.fields(rows)})
            partial.replace(self._path(chunk))
        except OSError as error:
            partial.unlink(missing_ok=True)
            cause = f"cannot write: {error.strerror}"
            raise OutputError(self.folder, cause, "make room or choose another folder") from error

    def load(self, chunk: int) -> BaselineRows:
        """A stored chunk."""
        with np.load(self._path(chunk), allow_pickle=False) as arrays:
            return BaselineRows(**{f.name: arrays[f.name] for f in dataclasses.fields(BaselineRows)})

    def _path(self, chunk: int) -> Path:
        return self.folder / f"chunk-{chunk:05d}.npz"
