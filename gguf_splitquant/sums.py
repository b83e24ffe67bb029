"""Sums that end up in files: the same on every machine.

numpy's dot products are BLAS, whose order of additions differs between processors. numpy's own sums add in an
order that depends on the length alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def sum_of_squares(values: NDArray[Any]) -> float:
    """``sum(values**2)``: squared in the dtype of ``values``, any shape, and added in float64."""
    return float(np.sum(np.square(values), dtype=np.float64))


def sums_of_squares(values: NDArray[Any], rows: int) -> list[float]:
    """:func:`sum_of_squares` of every ``rows`` rows; the last ones may be fewer."""
    return [sum_of_squares(values[first : first + rows]) for first in range(0, len(values), rows)]
