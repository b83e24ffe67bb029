"""Error feedback for one model: finds each weight's input statistics and shares the factorizations.

Weights that read one input (query, key and value; gate and up) come one after the other, so the factors of
the last input are kept, and those of the next ones may be made meanwhile: factoring uses one core, and a wide
input's takes longer than the narrow weights before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from ..errors import RecipeError
from ..planning.curves import InputStatistics, diagonal_of
from ..sums import sum_of_squares
from .blocks import refinable
from .feedback import ERROR_ROWS, RefinedRows, Refiner, TypedCluster
from .ggml import quantize_with_ggml
from .metric import DAMPING, typical_salience
from .row_kernels import round_to_bytes

_ROOM = 1.25
"""Matrices of the widest input whose factors are there at a time: those of two wide ones only if they follow
each other."""


@dataclass(frozen=True)
class ExpectedWeight:
    """A weight that will be refined: what :meth:`WeightRefiner.refine` will be given, without the values.

    Attributes:
        name: under which the statistics know it.
        columns: input channels.
        pieces: type and number of channels of each cluster, in ``order``.
        order: input channel at each position; None: as they are.
        expert: which of a stack's experts comes first.
    """

    name: str
    columns: int
    pieces: Sequence[tuple[GGMLQuantizationType, int]]
    order: NDArray[np.int64] | None = None
    expert: int | None = None


class WeightRefiner:
    """Quantizes the weights of one model. A context manager: leaving it ends its threads.

    Linear algebra has to be held to one thread around it (:func:`~..linear_algebra.blas_threads`), since
    that is a setting of the whole process and two threads use it here.

    Args:
        statistics: of the layer inputs; None, or a weight that they lack: every channel counts the same.
        threads: worker threads.
    """

    def __init__(self, statistics: InputStatistics | None, threads: int) -> None:
        self._statistics = statistics
        self._threads = threads
        self._refiner: Refiner | None = None
        self._key: Any = None
        self._expected: Sequence[ExpectedWeight] = ()
        self._ahead: dict[Any, Future[Refiner]] = {}
        self._background = ThreadPoolExecutor(1, thread_name_prefix="factor")
        self._workers = ThreadPoolExecutor(threads, thread_name_prefix="refine")

    def __enter__(self) -> WeightRefiner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._background, self._workers):
            pool.shutdown(wait=True, cancel_futures=True)

    def expect(self, weights: Sequence[ExpectedWeight]) -> None:
        """Say which weights come after the next one, in turn: they are factored meanwhile."""
        self._expected = [weight for weight in weights if _by_feedback(weight.pieces)]

    def refine(
        self,
        name: str,
        weight: NDArray[np.float32],
        pieces: Sequence[tuple[GGMLQuantizationType, int]],
        order: NDArray[np.int64] | None = None,
        expert: int | None = None,
    ) -> RefinedRows:
        """Quantize one weight, float32 ``(rows, columns)``.

        Args:
            name: under which the statistics know the weight.
            weight: the values.
            pieces: type and number of channels of each cluster, in ``order``.
            order: input channel at each position; None: as they are.
            expert: which of a stack's experts the weight is.

        Raises:
            SplitQuantError: the statistics do not fit the weight.
        """
        expert = self._own_expert(name, expert)
        clusters = _clusters(weight.shape[1], pieces, order)
        if _by_feedback(pieces):
            return self._refiner_for(name, clusters, weight.shape[1], expert).refine(weight)
        packed = self._with_ggml(name, weight, clusters, expert)

        def error(rows: slice) -> float:
            return sum(
                sum_of_squares(weight[rows, c.channels] - quants.dequantize(part[rows], c.qtype))
                for c, part in zip(clusters, packed, strict=True)
            )

        errors = list(self._workers.map(error, _pieces(weight)))
        return RefinedRows(packed, errors, self._powers(weight))

    def round(self, weight: NDArray[np.float32]) -> RefinedRows:
        """Quantize ``weight``, float32 ``(rows, columns)``, to Q8_0: every value to its nearest."""
        columns = weight.shape[1]
        packed = np.empty((len(weight), columns // 32, 34), np.uint8)

        def work(rows: slice) -> float:
            some = weight[rows]
            scale = np.empty((len(some), columns // 32), np.float32)
            codes = np.empty(some.shape, np.int8)
            lost = round_to_bytes(some, scale, codes)
            packed[rows, :, :2] = scale.astype(np.float16)[:, :, None].view(np.uint8)
            packed[rows, :, 2:] = codes.view(np.uint8).reshape(len(some), -1, 32)
            return lost

        errors = list(self._workers.map(work, _pieces(weight)))
        return RefinedRows((packed.reshape(len(weight), -1),), errors, self._powers(weight))

    def _powers(self, weight: NDArray[np.float32]) -> list[float]:
        return list(self._workers.map(lambda rows: sum_of_squares(weight[rows]), _pieces(weight)))

    def _with_ggml(
        self, name: str, weight: NDArray[np.float32], clusters: list[TypedCluster], expert: int | None
    ) -> tuple[NDArray[np.uint8], ...]:
        salience = diagonal_of(self._moments(name, weight.shape[1], expert)).astype(np.float32)
        importance = salience + np.float32(DAMPING * typical_salience(salience))
        return tuple(
            quantize_with_ggml(weight[:, c.channels], c.qtype, importance[c.channels], self._threads)
            for c in clusters
        )

    def _moments(self, name: str, columns: int, expert: int | None) -> NDArray[Any]:
        if self._statistics is None or self._statistics.input_of(name) is None:
            return np.ones(columns, np.float32)
        moments = self._statistics.matrix(name, expert)
        if moments.shape[0] != columns:
            raise RecipeError(name, f"has {columns} input channels, its statistics {moments.shape[0]}")
        return moments

    def _own_expert(self, name: str, expert: int | None) -> int | None:
        """``expert`` if it has statistics of its own: without, the experts of a stack share the factors."""
        known = self._statistics is not None and self._statistics.experts(name) is not None
        return expert if known else None

    def _refiner_for(
        self, name: str, clusters: list[TypedCluster], columns: int, expert: int | None
    ) -> Refiner:
        key = self._key_of(name, clusters, columns, expert)
        if self._refiner is None or key != self._key:
            self._refiner = None  # its factors are large: they go before others come
            made = self._ahead.pop(key, None)
            self._refiner = made.result() if made else self._make(name, clusters, columns, expert)
            self._key = key
        self._look_ahead(columns)
        return self._refiner

    def _look_ahead(self, columns: int) -> None:
        """Have the next factors made, and those after them in turn for which there is room.

        ``columns``: of the weight that is refined meanwhile.
        """
        if not self._expected:
            return
        coming: dict[Any, Any] = {}
        for weight in self._expected:
            clusters = _clusters(weight.columns, weight.pieces, weight.order)
            about = weight.name, clusters, weight.columns, self._own_expert(weight.name, weight.expert)
            coming.setdefault(self._key_of(*about), about)
        self._expected = ()
        coming.pop(self._key, None)
        for key in self._ahead.keys() - coming.keys():
            self._ahead.pop(key).cancel()
        sizes = {key: about[2] ** 2 for key, about in coming.items()}
        there = columns**2 + sum(sizes[key] for key in self._ahead)
        most = _ROOM * max([columns**2, *sizes.values()])
        for key, about in coming.items():
            if key in self._ahead:
                continue
            there += sizes[key]
            if self._ahead and there > most:
                break
            self._ahead[key] = self._background.submit(self._make, *about)

    def _make(self, name: str, clusters: list[TypedCluster], columns: int, expert: int | None) -> Refiner:
        return Refiner(self._moments(name, columns, expert), clusters, threads=self._threads)

    def _key_of(self, name: str, clusters: list[TypedCluster], columns: int, expert: int | None) -> Any:
        source = self._statistics.input_of(name) if self._statistics else None
        return source, expert, columns, tuple((c.qtype, c.channels.tobytes()) for c in clusters)


def _pieces(weight: NDArray[np.float32]) -> list[slice]:
    return [slice(start, start + ERROR_ROWS) for start in range(0, len(weight), ERROR_ROWS)]


def _by_feedback(pieces: Sequence[tuple[GGMLQuantizationType, int]]) -> bool:
    return all(qtype in refinable() for qtype, _ in pieces)


def _clusters(
    columns: int, pieces: Sequence[tuple[GGMLQuantizationType, int]], order: NDArray[np.int64] | None
) -> list[TypedCluster]:
    order = np.arange(columns) if order is None else order
    edges = np.cumsum([0, *(width for _, width in pieces)])
    return [TypedCluster(qtype, order[edges[i] : edges[i + 1]]) for i, (qtype, _) in enumerate(pieces)]
