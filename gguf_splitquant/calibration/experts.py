"""What each expert of a stack reads: the rows of the stack's input that the router sends to it.

An expert's second moments are ``channels**2`` figures; of all experts of a large model they are many times
the model. The rows that they are made of are fewer, for as long as an expert sees fewer tokens than it has
channels, and that is the rule. So the rows are what is kept, in half precision, each with a scale of its own,
and a matrix is made of them when it is asked for.

**Scale.** A stack computes, for each use (a token, one of the experts that it is sent to), ``E_e x``. Its
loss is taken *per use*: ``sum_e share_e tr(E_e H_e E_e^T)``, ``share_e`` the part of all uses that is expert
e's and ``H_e`` the moments of its rows. Per token it is as many times larger as a token uses experts: a
constant of the model, and the measured sensitivity (divergence per unit of loss) is per use too, so their
product does not depend on the choice. Inside one expert ``share_e`` is a constant as well: error feedback
needs ``H_e`` alone, while the planner, which gives the stack one type, weights the experts by their shares.
The pooled matrix ``sum_e share_e H_e`` is the mean over all uses: where every token uses the same number of
experts, that is the plain mean over tokens of what gate and up read, and the mean over (token, expert) pairs
of what down reads. It is in the same unit as each ``H_e``, so the two can be mixed.

**Shrinkage.** n rows determine a matrix of d channels badly when n is not many times d, and error feedback
believes what it is told. So an expert's matrix is pulled towards the pooled one, as if that were
``tau = PRIOR * d`` further rows: ``(n H_e + tau H_pooled) / (n + tau)``, the posterior mean under an inverse
Wishart prior. An expert that no token reached has the pooled matrix, one with many tokens its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import SplitQuantError
from ..planning.curves import ExpertUse

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

PRIOR = 1.0
"""Rows, per channel, that the pooled matrix counts for beside an expert's own."""

_ROWS, _ROUTES = ".rows", ".npz"
_SLAB = 1024


@dataclass(frozen=True)
class Routing:
    """Which experts multiply which rows of a stack's input.

    Attributes:
        experts: int32 (rows, experts per row).
        count: experts in the stack.
    """

    experts: I32
    count: int


class RowWriter:
    """Puts the rows that one stack's input consists of into a file.

    Args:
        stem: path of the files, without their endings.
        count: experts in the stack.
        channels: of the input.
    """

    def __init__(self, stem: Path, count: int, channels: int) -> None:
        self._stem = stem
        self._scales: list[F32] = []
        self._experts: list[I32] = []
        self.counts = np.zeros(count, np.int64)
        self._sums = np.zeros((count, channels))

    def add(self, inputs: F32, weighted: F32, experts: I32) -> None:
        """Add rows.

        Args:
            inputs: as they were computed, (rows, channels).
            weighted: as they count in second moments, (rows, channels).
            experts: that multiply each, (rows, experts per row).
        """
        squares = np.square(inputs, dtype=np.float64)
        for expert in np.unique(experts):
            chosen = (experts == expert).any(axis=1)
            self.counts[expert] += np.count_nonzero(chosen)
            # no product of matrices: BLAS' sums can depend on its threads
            self._sums[expert] += squares[chosen].sum(axis=0)
        scales = np.abs(weighted).max(axis=1, initial=0)
        scales[scales == 0] = 1
        # the first rows replace what a run that was killed has left
        with self._stem.with_suffix(_ROWS).open("ab" if self._scales else "wb") as file:
            file.write((weighted / scales[:, None]).astype(np.float16).data)
        self._scales.append(scales)
        self._experts.append(experts)

    def finish(self) -> None:
        """Write what is not in the file of rows: the routes, and each expert's sums of squares."""
        scales, experts = np.concatenate(self._scales), np.concatenate(self._experts)
        np.savez(self._stem.with_suffix(_ROUTES), scales=scales, experts=experts, sums=self._sums)


def expert_matrix(stem: Path, expert: int, pooled: F32) -> F32:
    """Second moments of what one expert reads, shrunk towards those of all: float32 (channels, channels).

    Args:
        stem: that of :class:`RowWriter`.
        expert: which.
        pooled: second moments of the whole stack's input.

    Raises:
        SplitQuantError: the files are damaged.
    """
    channels = len(pooled)
    try:
        with np.load(stem.with_suffix(_ROUTES)) as routes:
            chosen = np.flatnonzero((routes["experts"] == expert).any(axis=1))
            scales = routes["scales"][chosen]
            shape = (len(routes["scales"]), channels)
        rows = np.memmap(stem.with_suffix(_ROWS), np.float16, mode="r", shape=shape)
    except (OSError, ValueError, KeyError) as error:
        raise SplitQuantError(stem, f"cannot be read: {error}", f"delete {stem.parent}") from error
    prior = np.float32(PRIOR * channels)
    matrix: F32 = pooled * prior
    for start in range(0, len(chosen), _SLAB):
        here = slice(start, start + _SLAB)
        x = rows[chosen[here]].astype(np.float32) * scales[here, None]
        matrix += x.T @ x
    matrix /= np.float32(len(chosen)) + prior
    return matrix


def expert_energy(stem: Path, counts: Sequence[int], pooled: F64) -> F64:
    """Mean square of each channel as each expert sees it, (experts, channels); ``pooled`` where none did."""
    with np.load(stem.with_suffix(_ROUTES)) as routes:
        sums = np.asarray(routes["sums"], np.float64)
    uses = np.asarray(counts)[:, None]
    return np.where(uses > 0, sums / np.maximum(uses, 1), pooled)


def expert_use(counts: Sequence[int], channels: int) -> ExpertUse:
    """What calibration knows about experts that multiplied so many rows each."""
    uses = np.asarray(counts, np.float64)
    rare = np.flatnonzero(uses < PRIOR * channels)
    return ExpertUse(uses / max(uses.sum(), 1), tuple(rare.tolist()))
