"""The inner loop of packing, compiled: a look-up for every weight, and their codes side by side in bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray


@njit(cache=True, nogil=True)
def pack_codes(source: NDArray[Any], table: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Write the code bytes of blocks.

    Args:
        source: what ``table`` is indexed with, unsigned ``(blocks, groups, codes per byte, run)``: the codes
            of one byte are ``run`` columns apart, lowest bits first. 1, 2 or 4 codes per byte.
        table: the code of every value of ``source``.
        out: ``(blocks, groups, run)``.
    """
    blocks, groups, lanes, run = source.shape
    # written out: a loop over the codes of a byte takes four times as long
    for b in range(blocks):
        for g in range(groups):
            if lanes == 1:
                for i in range(run):
                    out[b, g, i] = table[source[b, g, 0, i]]
            elif lanes == 2:
                for i in range(run):
                    low, high = table[source[b, g, 0, i]], table[source[b, g, 1, i]]
                    out[b, g, i] = low | (high << 4)
            else:
                for i in range(run):
                    low = table[source[b, g, 0, i]] | (table[source[b, g, 1, i]] << 2)
                    high = table[source[b, g, 2, i]] | (table[source[b, g, 3, i]] << 2)
                    out[b, g, i] = low | (high << 4)
