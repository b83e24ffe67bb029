"""The inner loop of counting, compiled."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def count_patterns(patterns: NDArray[np.uint16], counts: NDArray[np.int64]) -> None:
    """Add to ``counts``, int64 ``(65536,)``, how often each of ``patterns``, uint16 ``(n,)``, occurs."""
    for pattern in patterns:
        counts[pattern] += 1
