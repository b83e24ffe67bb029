"""How much divergence each weight adds, as a function of the bits that its input channels get.

A curve is cheap: one factorization per layer input and one reading of the weights; nothing is quantized. It
multiplies three things: the model's sensitivity to errors in the layer's output (measured), the part of each
input channel that error feedback cannot make good (from the second moments), and the channel's weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..progress import SILENT, Progress
from ..sources.model import SourceTensor, to_float32
from ..splitting.histogram import check_finite, row_slabs

F64 = NDArray[np.float64]
I64 = NDArray[np.int64]


@dataclass(frozen=True)
class ExpertUse:
    """How the experts of a stack are used.

    Attributes:
        share: of all uses, by expert: (experts,), sums to 1.
        rare: experts seen too seldom for statistics of their own: theirs are mostly those of all together.
    """

    share: F64
    rare: tuple[int, ...]


@dataclass(frozen=True)
class Salience:
    """How much each channel of an input matters.

    Attributes:
        order: input channels, most salient first: int64 (channels,).
        left: in that order, what error feedback leaves of each channel's second moment: float64 (channels,).
    """

    order: I64
    left: F64


class InputStatistics(Protocol):
    """What calibration, or a llama.cpp imatrix, knows about layer inputs."""

    @property
    def sensitivity(self) -> Mapping[str, float]:
        """Divergence (nats per token) per unit of a layer's loss, by weight; empty if not measured."""

    def input_of(self, weight: str) -> str | None:
        """Name of the input that a weight reads: the same for weights that share it; None if unknown."""

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[Any]:
        """Second moments of that input, (channels, channels), or their diagonal, (channels,).

        Of a stack of experts: of what ``expert`` reads, or, without one, of what all read together, per use.
        """

    def salience(self, weight: str) -> Salience:
        """Of the channels of that input; of a stack, as all its experts read it together."""

    def experts(self, weight: str) -> ExpertUse | None:
        """Of a stack of experts; None for other weights, and where it is not known."""


def diagonal_of(moments: NDArray[Any]) -> NDArray[Any]:
    """Each channel's second moment, (channels,): of the whole matrix, or what is only that."""
    return moments if moments.ndim == 1 else np.diagonal(moments)


@dataclass(frozen=True)
class WeightCurve:
    """The predicted divergence of one weight.

    Attributes:
        name: of the weight.
        rows: output channels.
        source: name of the layer input; "" if nothing is known about it.
        order: input channels, most salient first; one object for all weights of an input.
        loss: ``loss[i]``: divergence if the first i channels of ``order`` had a relative loss of 1:
            float64 (channels + 1,), rising from 0.
    """

    name: str
    rows: int
    source: str
    order: I64
    loss: F64

    @property
    def input(self) -> str:
        """What other weights of one name here share their order with."""
        return self.source or self.name

    @property
    def columns(self) -> int:
        """Input channels."""
        return len(self.order)

    @property
    def n_params(self) -> int:
        """Weights."""
        return self.rows * self.columns


def weight_curves(
    tensors: Sequence[SourceTensor],
    statistics: InputStatistics | None,
    progress: Progress = SILENT,
) -> list[WeightCurve]:
    """The curves of some linear weights, in their order.

    Without measured sensitivities every weight counts in proportion to its parameters and its *relative*
    loss: then only comparisons mean something, not the divergence itself.

    Raises:
        CheckpointError: NaN or Inf in a weight.
        SplitQuantError: statistics that do not fit.
    """
    inputs: dict[str, Future[Salience]] = {}
    curves = []
    progress.start("planning", sum(t.n_params for t in tensors), "weights")
    with _factoring() as pool:
        named = [((statistics.input_of(t.name) if statistics else None) or "", t) for t in tensors]
        for source, tensor in named:
            if source and source not in inputs:
                assert statistics is not None
                inputs[source] = pool.submit(statistics.salience, tensor.name)
        for source, tensor in named:
            columns = tensor.shape[-1]
            power = _column_power(tensor, statistics.experts(tensor.name) if statistics else None)
            if source:
                salience = inputs[source].result()
            else:
                salience = Salience(np.arange(columns), np.ones(columns))
            curves.append((tensor, source, salience.order, salience.left * power[salience.order]))
            progress.advance(tensor.n_params, tensor.name)
    progress.finish()
    weights = _sensitivities([(t, float(d.sum())) for t, _, _, d in curves], statistics)
    return [
        WeightCurve(
            tensor.name,
            tensor.n_params // len(order),
            source,
            order,
            np.concatenate([[0.0], np.cumsum(density * weight)]),
        )
        for (tensor, source, order, density), weight in zip(curves, weights, strict=True)
    ]


@contextmanager
def _factoring() -> Iterator[ThreadPoolExecutor]:
    """Threads that factor second moments, two inputs at a time: more would cost memory. Each computes alone,
    because sums, and so decisions, must not depend on the number of threads."""
    # imported late: scipy takes its time, and the value split plans without it
    from ..linear_algebra import blas_threads

    with blas_threads(1), ThreadPoolExecutor(2, thread_name_prefix="factor") as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _sensitivities(
    losses: Sequence[tuple[SourceTensor, float]], statistics: InputStatistics | None
) -> list[float]:
    """The measured sensitivities; a weight without one counts like the median of those that have one, in
    proportion to its parameters."""
    measured = [statistics.sensitivity.get(t.name) if statistics else None for t, _ in losses]
    relative = [m * loss / t.n_params for m, (t, loss) in zip(measured, losses, strict=True) if m is not None]
    typical = float(np.median(relative)) if relative else 1.0
    return [
        m if m is not None else (typical * t.n_params / loss if loss > 0 else 0.0)
        for m, (t, loss) in zip(measured, losses, strict=True)
    ]


def _column_power(tensor: SourceTensor, use: ExpertUse | None) -> F64:
    """Sum of squares of each input channel's weights: (columns,). Experts count as often as they are used."""
    power = np.zeros(tensor.shape[-1])
    for first_row, raw in row_slabs(tensor):
        check_finite(tensor, first_row, raw)
        values = to_float32(raw, tensor.dtype)
        if use is None:
            values = values.reshape(-1, tensor.shape[-1])
            power += np.einsum("ij,ij->j", values, values, dtype=np.float64)
        else:
            share = use.share[first_row : first_row + len(raw)]
            power += share @ np.einsum("eij,eij->ej", values, values, dtype=np.float64)
    return power
