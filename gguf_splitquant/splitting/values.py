"""The value split: a weight becomes the sum of k sub-layers, each holding one value cluster.

SplitQuantV2 (arXiv 2503.07657, section 3): k-means on the values of one weight; a value belongs to the
cluster whose centre is nearest, so clusters meet at the midpoints of the centres; every sub-layer has the
weight's full shape and zeros where another cluster's values are. The bias is added once, with the sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..sources.model import SourceTensor, to_float32
from .histogram import ValueHistogram, row_slabs
from .kmeans1d import kmeans1d

_F32 = NDArray[np.float32]


@dataclass(frozen=True)
class ValueSplit:
    """Where one weight is cut, and what range each cluster spans.

    Attributes:
        boundaries: float32 ``(k - 1,)``, ascending; a value equal to a boundary belongs below it.
        lows, highs: float32 ``(k,)``: least and greatest value in each cluster.
    """

    boundaries: _F32
    lows: _F32
    highs: _F32

    @property
    def k(self) -> int:
        """Number of clusters, at least 1; fewer than asked for where the weight has fewer distinct values."""
        return int(self.lows.size)

    def members(self, values: _F32, cluster: int) -> NDArray[np.bool_]:
        """Which values belong to one cluster. Same shape as ``values``."""
        inside = np.ones(values.shape, np.bool_)
        if cluster > 0:
            inside &= values > self.boundaries[cluster - 1]
        if cluster < self.k - 1:
            inside &= values <= self.boundaries[cluster]
        return inside


def fit_value_split(tensor: SourceTensor, histogram: ValueHistogram, k: int) -> ValueSplit:
    """Cluster a tensor's values.

    Args:
        tensor: any rank; read once more, slab by slab, only if its histogram is not exact.
        histogram: of this tensor.
        k: clusters wanted, at least 1.

    Returns:
        The split, with as many clusters as have members.
    """
    centres = kmeans1d(histogram.values, histogram.counts, k)
    boundaries = ((centres[:-1] + centres[1:]) / 2).astype(np.float32)
    if histogram.exact:
        # float32 holds every value of the three checkpoint types, so this is the data itself
        slabs: Iterator[_F32] = iter([histogram.values.astype(np.float32)])
    else:
        slabs = (to_float32(raw, tensor.dtype) for _, raw in row_slabs(tensor))
    lows, highs = _cluster_ranges(slabs, boundaries)
    filled = lows <= highs
    if not filled.all():
        # two centres can round to one float32 boundary: drop the cluster between them
        keep = np.flatnonzero(filled)
        boundaries = boundaries[keep[1:] - 1]
        lows, highs = lows[keep], highs[keep]
    return ValueSplit(boundaries, lows, highs)


def _cluster_ranges(slabs: Iterator[_F32], boundaries: _F32) -> tuple[_F32, _F32]:
    """Least and greatest value of each cluster, ``(k,)`` each; an empty cluster has low > high."""
    k = boundaries.size + 1
    lows = np.full(k, np.inf, np.float32)
    highs = np.full(k, -np.inf, np.float32)
    for values in slabs:
        cluster = np.searchsorted(boundaries, values.ravel(), side="left")
        for index in range(k):
            members = values.ravel()[cluster == index]
            if members.size:
                lows[index] = min(lows[index], members.min())
                highs[index] = max(highs[index], members.max())
    return lows, highs


def float_sub_layers(values: _F32, split: ValueSplit) -> list[_F32]:
    """The sub-layers of a slab, unquantized: float32, each of ``values``' shape.

    The zeros are negative: ``x + -0.0`` is ``x`` for every x, a zero of either sign included, so the float
    sum of the sub-layers, in any order, is the original bit for bit.
    """
    nothing = np.float32(-0.0)
    return [np.where(split.members(values, c), values, nothing) for c in range(split.k)]


__all__ = ["ValueSplit", "fit_value_split", "float_sub_layers"]
