"""The inner loops of error feedback, compiled: one sub-block of 16 or 32 columns, many rows at a time.

Everything here works on *transposed* tiles, ``(columns, LANES rows)``: the dependency between columns is
sequential, rows are independent, so the innermost loop runs over rows and the compiler turns it into
vector code. The functions release the interpreter lock and are called from a thread per row chunk.

The problem that a call solves, for every row: given targets ``x`` (columns of one block), and the lower
triangular factor ``M`` of the block's metric, choose the block's scale ``s``, offset ``o`` and level indices
to minimize ``|M (x - q)|^2`` with ``q = s * level + o``. ``M`` is passed normalized: ``low`` has a unit
diagonal and ``weight`` is the squared diagonal, so that rounding column ``i`` to its fed-back target ``t_i``
costs exactly ``weight_i * (t_i - q_i)^2``.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from .scales import F32, admit, reciprocal

LANES = 128
"""Rows in a tile: a multiple of every vector width, and small enough for a block to stay in L1."""

_SAME_EVERYWHERE = {"nnan", "ninf", "nsz"}
"""No reassociation, no fused multiply-add, no estimated reciprocals: those depend on the processor, and with
them one weight in a hundred thousand rounded the other way. Costs 2 to 10 % of the time."""


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _nearest(value: F32, levels: F32, middles: F32) -> None:
    """Replace values, in units of the scale, by the nearest of 16 levels.

    The loop over lanes is the inner one, and several midpoints go through it at a time: that is what the
    compiler turns into vector code, several times faster than any search per lane.
    """
    chosen = np.empty(LANES, np.float32)
    for r in range(LANES):
        chosen[r] = levels[0]
    for k in range(0, 15, 5):
        m0, m1, m2, m3, m4 = middles[k], middles[k + 1], middles[k + 2], middles[k + 3], middles[k + 4]
        q0, q1, q2, q3, q4 = levels[k + 1], levels[k + 2], levels[k + 3], levels[k + 4], levels[k + 5]
        for r in range(LANES):
            u, q = value[r], chosen[r]
            q = q0 if u > m0 else q
            q = q1 if u > m1 else q
            q = q2 if u > m2 else q
            q = q3 if u > m3 else q
            chosen[r] = q4 if u > m4 else q
    for r in range(LANES):
        value[r] = chosen[r]


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _round_apart(
    x: F32,
    weight: F32,
    scale: F32,
    offset: F32,
    levels: F32,
    middles: F32,
    uniform: bool,
    keep: bool,
    level: F32,
    cost: F32,
    inverse: F32,
) -> None:
    """:func:`_feed_back` for columns that do not interact: several times faster.

    Writes the cost per lane, and the levels if they are to be kept.
    """
    bottom, top = levels[0], levels[-1]
    for r in range(LANES):
        cost[r] = np.float32(0)
        inverse[r] = reciprocal(scale[r])
    for i in range(x.shape[0]):
        w = weight[i]
        if uniform and not keep:
            for r in range(LANES):
                u = min(max(np.rint((x[i, r] - offset[r]) * inverse[r]), bottom), top)
                miss = x[i, r] - (scale[r] * u + offset[r])
                cost[r] += w * miss * miss
        elif uniform:
            for r in range(LANES):
                u = min(max(np.rint((x[i, r] - offset[r]) * inverse[r]), bottom), top)
                level[i, r] = u
                miss = x[i, r] - (scale[r] * u + offset[r])
                cost[r] += w * miss * miss
        else:
            for r in range(LANES):
                level[i, r] = (x[i, r] - offset[r]) * inverse[r]
            _nearest(level[i], levels, middles)
            for r in range(LANES):
                miss = x[i, r] - (scale[r] * level[i, r] + offset[r])
                cost[r] += w * miss * miss


@njit(cache=True, nogil=True)
def _below_diagonal(low: F32) -> bool:
    """Columns interact: there is something below the diagonal of their metric's factor."""
    for i in range(low.shape[0]):
        for j in range(i):
            if low[i, j] != 0:
                return True
    return False


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _feed_back(
    x: F32,
    low: F32,
    weight: F32,
    coupled: bool,
    scale: F32,
    offset: F32,
    levels: F32,
    middles: F32,
    uniform: bool,
    keep: bool,
    level: F32,
    error: F32,
    cost: F32,
    target: F32,
    inverse: F32,
) -> None:
    """Round all columns in order, each after adding what the earlier ones got wrong (Babai's nearest plane).

    Writes the cost per lane, the levels chosen, unless they are not to be kept, and, of columns that interact
    (``coupled``), the errors ``x - value``.
    """
    if not coupled:
        _round_apart(x, weight, scale, offset, levels, middles, uniform, keep, level, cost, inverse)
        return
    n = x.shape[0]
    bottom, top = levels[0], levels[-1]
    for r in range(LANES):
        cost[r] = np.float32(0)
        inverse[r] = reciprocal(scale[r])
    for i in range(n):
        for r in range(LANES):
            target[r] = x[i, r]
        j = 0
        while j + 4 <= i:  # four at a time: the running sum stays in a register
            a, b, c, d = low[i, j], low[i, j + 1], low[i, j + 2], low[i, j + 3]
            for r in range(LANES):
                target[r] += a * error[j, r] + b * error[j + 1, r] + c * error[j + 2, r] + d * error[j + 3, r]
            j += 4
        while j < i:
            a = low[i, j]
            for r in range(LANES):
                target[r] += a * error[j, r]
            j += 1
        w = weight[i]
        if uniform:
            for r in range(LANES):
                u = np.rint((target[r] - offset[r]) * inverse[r])
                level[i, r] = min(max(u, bottom), top)
        else:
            for r in range(LANES):
                level[i, r] = (target[r] - offset[r]) * inverse[r]
            _nearest(level[i], levels, middles)
        for r in range(LANES):
            value = scale[r] * level[i, r] + offset[r]
            error[i, r] = x[i, r] - value
            miss = target[r] - value
            cost[r] += w * miss * miss


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _cost_of(
    error: F32,
    low: F32,
    weight: F32,
    cost: F32,
    target: F32,
) -> None:
    """``|M e|^2`` per lane."""
    n = error.shape[0]
    for r in range(LANES):
        cost[r] = np.float32(0)
    for i in range(n):
        for r in range(LANES):
            target[r] = error[i, r]
        for j in range(i):
            a = low[i, j]
            for r in range(LANES):
                target[r] += a * error[j, r]
        w = weight[i]
        for r in range(LANES):
            cost[r] += w * target[r] * target[r]


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _fit(
    x: F32,
    low: F32,
    weight: F32,
    coupled: bool,
    level: F32,
    affine: bool,
    scale: F32,
    offset: F32,
    mx: F32,
    ml: F32,
) -> None:
    """Least-squares scale (and offset) for given levels under the metric ``M``: normal equations."""
    n = x.shape[0]
    sll = np.zeros(LANES, np.float32)
    slo = np.zeros(LANES, np.float32)
    slx = np.zeros(LANES, np.float32)
    sox = np.zeros(LANES, np.float32)
    soo = np.float32(0)
    for i in range(n):
        one = np.float32(1)
        for r in range(LANES):
            mx[r] = x[i, r]
            ml[r] = level[i, r]
        for j in range(i if coupled else 0):
            a = low[i, j]
            one += a
            for r in range(LANES):
                mx[r] += a * x[j, r]
                ml[r] += a * level[j, r]
        w = weight[i]
        soo += w * one * one
        wo = w * one
        for r in range(LANES):
            sll[r] += w * ml[r] * ml[r]
            slx[r] += w * ml[r] * mx[r]
            slo[r] += wo * ml[r]
            sox[r] += wo * mx[r]
    for r in range(LANES):
        if affine:
            det = sll[r] * soo - slo[r] * slo[r]
            if det > np.float32(1e-6) * sll[r] * soo:
                scale[r] = (slx[r] * soo - sox[r] * slo[r]) / det
                offset[r] = (sll[r] * sox[r] - slo[r] * slx[r]) / det
        elif sll[r] > np.float32(0):
            scale[r] = slx[r] / sll[r]


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _descend(
    x: F32,
    gram: F32,
    scale: F32,
    offset: F32,
    levels: F32,
    middles: F32,
    uniform: bool,
    level: F32,
    error: F32,
    slope: F32,
    delta: F32,
    inverse: F32,
    sweeps: int,
) -> None:
    """Coordinate descent on the levels with scale and offset fixed: each column to its best in turn."""
    n = x.shape[0]
    bottom, top = levels[0], levels[-1]
    for r in range(LANES):
        inverse[r] = reciprocal(scale[r])
    for i in range(n):
        for r in range(LANES):
            slope[i, r] = np.float32(0)
        for j in range(n):
            a = gram[i, j]
            for r in range(LANES):
                slope[i, r] += a * error[j, r]
    for _ in range(sweeps):
        for i in range(n):
            inverse_curvature = np.float32(1) / gram[i, i]
            for r in range(LANES):
                wanted = x[i, r] - error[i, r] + slope[i, r] * inverse_curvature
                level[i, r] = (wanted - offset[r]) * inverse[r]
            if uniform:
                for r in range(LANES):
                    level[i, r] = min(max(np.rint(level[i, r]), bottom), top)
            else:
                _nearest(level[i], levels, middles)
            for r in range(LANES):
                fresh = x[i, r] - (scale[r] * level[i, r] + offset[r])
                delta[r] = fresh - error[i, r]
                error[i, r] = fresh
            for j in range(n):
                a = gram[j, i]
                for r in range(LANES):
                    slope[j, r] += a * delta[r]


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _keep_better_scale(
    cost: F32, scale: F32, offset: F32, best: F32, best_scale: F32, best_offset: F32
) -> None:
    """Lane by lane, replace the best cost, scale and offset by these where they cost less."""
    for r in range(LANES):
        best_scale[r] = scale[r] if cost[r] < best[r] else best_scale[r]
        best_offset[r] = offset[r] if cost[r] < best[r] else best_offset[r]
        best[r] = min(cost[r], best[r])


@njit(cache=True, nogil=True, fastmath=_SAME_EVERYWHERE)
def _keep_better(
    cost: F32,
    level: F32,
    scale: F32,
    offset: F32,
    best: F32,
    best_level: F32,
    best_scale: F32,
    best_offset: F32,
) -> None:
    """Lane by lane, replace the best solution by this one where it costs less."""
    # what is loaded before the comparison needs no branch: five times faster
    for i in range(level.shape[0]):
        for r in range(LANES):
            fresh, kept, c, b = level[i, r], best_level[i, r], cost[r], best[r]
            best_level[i, r] = fresh if c < b else kept
    _keep_better_scale(cost, scale, offset, best, best_scale, best_offset)


@njit(cache=True, nogil=True)
def solve_block(
    target_x: F32,
    original: F32,
    low: F32,
    weight: F32,
    gram: F32,
    levels: F32,
    middles: F32,
    uniform: bool,
    affine: bool,
    falling: bool,
    trials: F32,
    refits: int,
    sweeps: int,
    rounding: int,
    unit: F32,
    offset_unit: F32,
    k_low: int,
    k_high: int,
    l_high: int,
    first: bool,
    scale: F32,
    offset: F32,
    codes: NDArray[np.uint8],
    error: F32,
    change: F32,
) -> float:
    """Choose scale, offset and levels of one block for all rows of a chunk; return the cost it saved.

    Args:
        target_x: what the block should be once the errors of the other columns are made good (n, rows);
            rows is a multiple of LANES.
        original: the weights (n, rows).
        low, weight, gram: the block's metric: unit lower triangular factor (n, n), squared diagonal (n,) and
            ``M^T M`` (n, n).
        levels, middles: what a code stands for, and the midpoints between; ``uniform`` where they are
            consecutive integers.
        affine: blocks have an offset; ``falling``: one that can only be subtracted.
        trials: (count, 2): fraction of the block's range, and where that range is anchored (affine) or the
            sign of the scale.
        refits: least-squares fits of the best trial, each followed by rounding again.
        sweeps: coordinate descents over the columns at the end.
        rounding: what a scale may be; for ROUND_LATTICE in multiples ``k_low`` to ``k_high`` of ``unit``
            (rows,), offsets 0 to ``-l_high`` of ``offset_unit`` (rows,).
        first: there is no solution yet, and minus the cost is returned; otherwise the present one stays
            where nothing better is found.
        scale, offset, codes: the solution, updated in place: (rows,), (rows,), (n, rows).
        error: ``original`` minus the quantized weights, updated in place (n, rows).
        change: receives how much ``error`` changed (n, rows).
    """
    n, rows = target_x.shape
    coupled = _below_diagonal(low)
    bottom = np.int32(levels[0])
    span = levels[-1] - levels[0]
    extreme = max(abs(levels[0]), abs(levels[-1]))
    code_of = np.zeros(int(span) + 1, np.uint8)  # levels are integers
    for k in range(levels.shape[0]):
        code_of[np.int32(levels[k]) - bottom] = k
    x = np.empty((n, LANES), np.float32)
    level = np.empty((n, LANES), np.float32)
    best_level = np.zeros((n, LANES), np.float32)
    miss = np.empty((n, LANES), np.float32)
    slope = np.empty((n, LANES), np.float32)
    # one allocation each: rows of one array may overlap for all that the compiler knows, and stay scalar code
    s = np.zeros(LANES, np.float32)
    best_s = np.zeros(LANES, np.float32)
    o = np.zeros(LANES, np.float32)
    best_o = np.zeros(LANES, np.float32)
    cost = np.zeros(LANES, np.float32)
    best = np.zeros(LANES, np.float32)
    small = np.zeros(LANES, np.float32)
    large = np.zeros(LANES, np.float32)
    t0 = np.zeros(LANES, np.float32)
    t1 = np.zeros(LANES, np.float32)
    saved = 0.0
    for start in range(0, rows, LANES):
        u = unit[start : start + LANES]
        ou = offset_unit[start : start + LANES]
        for i in range(n):
            for r in range(LANES):
                x[i, r] = target_x[i, start + r]
        for r in range(LANES):
            # an offset that can only be subtracted: the range always holds zero
            small[r] = np.float32(0) if falling else x[0, r]
            large[r] = np.float32(0) if falling else x[0, r]
        for i in range(n):
            for r in range(LANES):
                small[r] = min(small[r], x[i, r])
                large[r] = max(large[r], x[i, r])
        for r in range(LANES):
            best[r] = np.float32(3e38)
            best_s[r] = scale[start + r]
            best_o[r] = offset[start + r]
        if not first:
            for i in range(n):
                for r in range(LANES):
                    best_level[i, r] = levels[codes[i, start + r]]
                    miss[i, r] = x[i, r] - (best_s[r] * best_level[i, r] + best_o[r])
            _cost_of(miss, low, weight, best, t0)
            for r in range(LANES):
                saved += best[r]
        for attempt in range(trials.shape[0]):
            fraction = trials[attempt, 0]
            anchor = trials[attempt, 1]
            if affine:
                for r in range(LANES):
                    spread = large[r] - small[r]
                    s[r] = fraction * spread / span
                    o[r] = small[r] + anchor * (np.float32(1) - fraction) * spread
            else:
                for r in range(LANES):
                    s[r] = anchor * fraction * max(large[r], -small[r]) / extreme
                    o[r] = np.float32(0)
            admit(s, o, affine, rounding, u, ou, k_low, k_high, l_high)
            _feed_back(
                x, low, weight, coupled, s, o, levels, middles, uniform, False, level, miss, cost, t0, t1
            )
            _keep_better_scale(cost, s, o, best, best_s, best_o)
        if trials.shape[0]:
            # levels of the best trial alone: keeping every better one's took as long as trying
            _feed_back(
                x,
                low,
                weight,
                coupled,
                best_s,
                best_o,
                levels,
                middles,
                uniform,
                True,
                best_level,
                miss,
                best,
                t0,
                t1,
            )
        for _ in range(refits):
            for r in range(LANES):
                s[r] = best_s[r]
                o[r] = best_o[r]
            _fit(x, low, weight, coupled, best_level, affine, s, o, t0, t1)
            if falling:
                for r in range(LANES):
                    o[r] = min(o[r], np.float32(0))
            admit(s, o, affine, rounding, u, ou, k_low, k_high, l_high)
            _feed_back(
                x, low, weight, coupled, s, o, levels, middles, uniform, True, level, miss, cost, t0, t1
            )
            _keep_better(cost, level, s, o, best, best_level, best_s, best_o)
        if sweeps > 0 and coupled:  # uncoupled columns are at their best already
            for i in range(n):
                for r in range(LANES):
                    level[i, r] = best_level[i, r]
                    miss[i, r] = x[i, r] - (best_s[r] * level[i, r] + best_o[r])
            _descend(x, gram, best_s, best_o, levels, middles, uniform, level, miss, slope, t0, t1, sweeps)
            _cost_of(miss, low, weight, cost, t0)
            _keep_better(cost, level, best_s, best_o, best, best_level, best_s, best_o)
        for r in range(LANES):
            saved -= best[r]
            scale[start + r] = best_s[r]
            offset[start + r] = best_o[r]
        for i in range(n):
            if uniform:
                for r in range(LANES):
                    codes[i, start + r] = np.uint8(np.int32(best_level[i, r]) - bottom)
            else:
                for r in range(LANES):
                    codes[i, start + r] = code_of[np.int32(best_level[i, r]) - bottom]
            for r in range(LANES):
                fresh = original[i, start + r] - (best_s[r] * best_level[i, r] + best_o[r])
                change[i, start + r] = fresh - error[i, start + r]
                error[i, start + r] = fresh
    return saved
