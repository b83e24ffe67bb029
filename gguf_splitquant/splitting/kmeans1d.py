"""Exact k-means in one dimension: the global optimum, without a seed and without restarts.

In one dimension an optimal clustering cuts the sorted values into k intervals, so dynamic programming over
the cut positions finds it (Wang and Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011). The best cut position
moves monotonically with the interval's end, which divide and conquer uses: O(k n log n) for n distinct
values, here done one recursion level at a time so that numpy does the loops.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_F64 = NDArray[np.float64]
_I64 = NDArray[np.int64]


def kmeans1d(values: _F64, counts: _I64, k: int) -> _F64:
    """Centres of the optimal k-means clustering of weighted values.

    Args:
        values: float64 ``(n,)``, strictly ascending, finite.
        counts: weights ``(n,)``, positive.
        k: number of clusters, at least 1. With fewer than k distinct values each becomes a cluster.

    Returns:
        Centres, float64 ``(min(k, n),)``, ascending; equal only where values differ by less than the
        rounding of their spread.

    Raises:
        ValueError: empty input, ``k`` below 1, or values not strictly ascending.
    """
    if values.size == 0 or k < 1:
        raise ValueError(f"k-means of {values.size} values into {k} clusters")
    if values.size > 1 and not np.all(np.diff(values) > 0):
        raise ValueError("values must be strictly ascending")
    if k >= values.size:
        return values.copy()
    # the sums of squares below lose digits to cancellation when the values sit far from zero
    shift = float(np.average(values, weights=counts))
    cost = _IntervalCost(values - shift, counts)
    cuts = _optimal_cuts(cost, k)
    return cost.means(np.concatenate(([0], cuts, [values.size]))) + shift


class _IntervalCost:
    """Within-cluster sum of squares of ``values[i:j]`` from prefix sums, vectorized over i and j."""

    def __init__(self, values: _F64, counts: _I64) -> None:
        weights = counts.astype(np.float64)
        self.n = values.size
        self.weight = np.concatenate(([0.0], np.cumsum(weights)))
        self.sum = np.concatenate(([0.0], np.cumsum(weights * values)))
        self.square = np.concatenate(([0.0], np.cumsum(weights * values * values)))

    def __call__(self, start: _I64, stop: _I64) -> _F64:
        """Cost of the intervals ``[start, stop)``; start < stop everywhere."""
        total = self.sum[stop] - self.sum[start]
        result: _F64 = (
            self.square[stop] - self.square[start] - total * total / (self.weight[stop] - self.weight[start])
        )
        return result

    def means(self, cuts: _I64) -> _F64:
        """Weighted mean of each interval between neighbouring cuts."""
        result: _F64 = np.diff(self.sum[cuts]) / np.diff(self.weight[cuts])
        return result


def _optimal_cuts(cost: _IntervalCost, k: int) -> _I64:
    """The k - 1 inner cut positions, ascending."""
    ends = np.arange(1, cost.n + 1)
    # best[j]: least cost of the first j values in the clusters placed so far, none of them empty
    best = np.full(cost.n + 1, np.inf)
    best[1:] = cost(np.zeros(cost.n, np.int64), ends)
    choices: list[_I64] = []
    for cluster in range(2, k):
        best, choice = _add_cluster(cost, best, cluster)
        choices.append(choice)
    cuts: list[int] = []
    if k > 1:
        # the last cluster ends at n, so its row of the table has one entry
        starts = np.arange(k - 1, cost.n)
        cuts.append(int(starts[np.argmin(best[starts] + cost(starts, np.full(starts.size, cost.n)))]))
        for choice in reversed(choices):
            cuts.append(int(choice[cuts[-1]]))
    return np.array(cuts[::-1], np.int64)


def _add_cluster(cost: _IntervalCost, previous: _F64, cluster: int) -> tuple[_F64, _I64]:
    """One row of the table: the first j values in ``cluster`` clusters, for every j.

    Returns the least costs ``(n + 1,)`` and where the last cluster starts ``(n + 1,)``.
    """
    first, last = cluster, cost.n
    best = np.full(last + 1, np.inf)
    choice = np.full(last + 1, cluster - 1, np.int64)
    outer = np.array([first, last] if first < last else [first])
    _solve(cost, previous, outer, np.full(outer.size, cluster - 1), outer - 1, best, choice)
    stride = 1 << max(0, last - first).bit_length()
    while (stride := stride // 2) >= 1:
        # the ends solved so far are those at multiples of 2 * stride from the first, and the last
        ends = np.arange(first + stride, last, 2 * stride)
        if ends.size:
            lowest = choice[ends - stride]
            highest = np.minimum(choice[np.minimum(ends + stride, last)], ends - 1)
            _solve(cost, previous, ends, lowest, highest, best, choice)
    return best, choice


def _solve(
    cost: _IntervalCost, previous: _F64, ends: _I64, lowest: _I64, highest: _I64, best: _F64, choice: _I64
) -> None:
    """For each end, try every start in ``[lowest, highest]``; the first of equal minima wins."""
    lengths = highest - lowest + 1
    offsets = np.concatenate(([0], np.cumsum(lengths)[:-1]))
    segment = np.repeat(np.arange(ends.size), lengths)
    starts = np.arange(segment.size) - np.repeat(offsets - lowest, lengths)
    totals = previous[starts] + cost(starts, ends[segment])
    least = np.minimum.reduceat(totals, offsets)
    hits = np.flatnonzero(totals == least[segment])[::-1]
    winner = np.empty(ends.size, np.int64)
    winner[segment[hits]] = starts[hits]
    best[ends] = least
    choice[ends] = winner
