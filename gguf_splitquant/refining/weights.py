"""Error feedback for one model: finds each weight's input statistics and shares the factorizations.

Weights that read one input (query, key and value; gate and up) come one after the other, so the factors of
the last input are kept and no others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from .feedback import Refiner

if TYPE_CHECKING:
    from ..calibration.moments import Moments


class WeightRefiner:
    """Quantizes the weights of one model.

    Args:
        moments: statistics of the layer inputs; None, or a weight that they lack: every channel counts the
            same.
        threads: worker threads.
    """

    def __init__(self, moments: Moments | None, threads: int) -> None:
        self._moments = moments
        self._threads = threads
        self._refiner: Refiner | None = None
        self._key: tuple[str | None, int, GGMLQuantizationType] | None = None

    def refine(
        self, name: str, weight: NDArray[np.float32], qtype: GGMLQuantizationType
    ) -> tuple[NDArray[np.uint8], float]:
        """Quantize one weight, float32 ``(rows, columns)``.

        Returns:
            The packed rows, uint8 ``(rows, row_bytes)``, and sum((w - decoded)**2) / sum(w**2). Error
            feedback trades that figure for a smaller error of the layer's output.

        Raises:
            SplitQuantError: the statistics do not fit the weight.
        """
        packed = self._refiner_for(name, weight.shape[1], qtype).refine(weight).packed[0]
        difference = weight - quants.dequantize(packed, qtype)
        power = float(np.vdot(weight, weight))
        return packed, float(np.vdot(difference, difference)) / power if power else 0.0

    def _refiner_for(self, name: str, columns: int, qtype: GGMLQuantizationType) -> Refiner:
        source = self._moments.input_of(name) if self._moments else None
        key = (source, columns, qtype)
        if self._refiner is None or key != self._key:
            statistics: NDArray[Any] = np.ones(columns, np.float32)
            if self._moments and source is not None:
                statistics = self._moments.matrix(name)
            self._refiner = Refiner(statistics, qtype, threads=self._threads)
            self._key = key
        return self._refiner
