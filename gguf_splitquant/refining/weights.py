"""Error feedback for one model: finds each weight's input statistics and shares the factorizations.

Weights that read one input (query, key and value; gate and up) come one after the other, so the factors of
the last input are kept and no others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from ..errors import RecipeError
from ..planning.curves import InputStatistics, diagonal_of
from ..sums import sum_of_squares
from .blocks import refinable
from .feedback import Refiner, TypedCluster
from .ggml import quantize_with_ggml
from .metric import DAMPING, typical_salience


class WeightRefiner:
    """Quantizes the weights of one model.

    Args:
        statistics: of the layer inputs; None, or a weight that they lack: every channel counts the same.
        threads: worker threads.
    """

    def __init__(self, statistics: InputStatistics | None, threads: int) -> None:
        self._statistics = statistics
        self._threads = threads
        self._refiner: Refiner | None = None
        self._key: Any = None

    def refine(
        self,
        name: str,
        weight: NDArray[np.float32],
        pieces: Sequence[tuple[GGMLQuantizationType, int]],
        order: NDArray[np.int64] | None = None,
    ) -> tuple[tuple[NDArray[np.uint8], ...], float]:
        """Quantize one weight, float32 ``(rows, columns)``.

        Args:
            name: under which the statistics know the weight.
            weight: the values.
            pieces: type and number of channels of each cluster, in ``order``.
            order: input channel at each position; None: as they are.

        Returns:
            The packed rows of each cluster, uint8 ``(rows, row_bytes)``, and sum((w - decoded)**2) of all.
            Error feedback trades that figure for a smaller error of the layer's output.

        Raises:
            SplitQuantError: the statistics do not fit the weight.
        """
        order = np.arange(weight.shape[1]) if order is None else order
        edges = np.cumsum([0, *(width for _, width in pieces)])
        clusters = [
            TypedCluster(qtype, order[edges[i] : edges[i + 1]]) for i, (qtype, _) in enumerate(pieces)
        ]
        packed: tuple[NDArray[np.uint8], ...]
        if all(qtype in refinable() for qtype, _ in pieces):
            packed = self._refiner_for(name, clusters, weight.shape[1]).refine(weight).packed
        else:
            packed = self._with_ggml(name, weight, clusters)
        error = 0.0
        for cluster, part in zip(clusters, packed, strict=True):
            difference = weight[:, cluster.channels] - quants.dequantize(part, cluster.qtype)
            error += sum_of_squares(difference)
        return packed, error

    def _with_ggml(
        self, name: str, weight: NDArray[np.float32], clusters: list[TypedCluster]
    ) -> tuple[NDArray[np.uint8], ...]:
        salience = diagonal_of(self._moments(name, weight.shape[1])).astype(np.float32)
        importance = salience + np.float32(DAMPING * typical_salience(salience))
        return tuple(
            quantize_with_ggml(weight[:, c.channels], c.qtype, importance[c.channels], self._threads)
            for c in clusters
        )

    def _moments(self, name: str, columns: int) -> NDArray[Any]:
        if self._statistics is None or self._statistics.input_of(name) is None:
            return np.ones(columns, np.float32)
        moments = self._statistics.matrix(name)
        if moments.shape[0] != columns:
            raise RecipeError(name, f"has {columns} input channels, its statistics {moments.shape[0]}")
        return moments

    def _refiner_for(self, name: str, clusters: list[TypedCluster], columns: int) -> Refiner:
        source = self._statistics.input_of(name) if self._statistics else None
        key = (source, columns, [(c.qtype, c.channels.tobytes()) for c in clusters])
        if self._refiner is None or key != self._key:
            self._refiner = Refiner(self._moments(name, columns), clusters, threads=self._threads)
            self._key = key
        return self._refiner
