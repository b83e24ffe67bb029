"""What error feedback needs to know about a layer's input, prepared once for all weights that read it.

The input's channels are in clusters, each with a block type of its own; an ordinary weight has one.

The loss of quantizing ``W`` to ``Q`` is ``tr(E H E^T)``, ``E = W - Q``, with ``H`` the second moments of the
layer's input (Frantar et al., GPTQ, arXiv 2210.17323, section 2; Hassibi & Stork 1993). Rows are independent.
Two exact rewritings of that loss drive the sweeps:

* *First sweep.* ``H = M^T M`` with ``M`` lower triangular in visiting order. With all columns up to a block
  decided and the later ones still free, the loss of the block is ``|M_bb (x_b - q_b)|^2`` at the target
  ``x_b = w_b + M_bb^-1 M_b,before E_before``. That is GPTQ without the inverse of H: one Cholesky
  factorization instead of three cubic steps.
* *Later sweeps.* With every other column decided, the block's loss is ``(x_b - q_b)^T H_bb (x_b - q_b)`` at
  ``x_b = w_b + H_bb^-1 H_b,rest E_rest``: block coordinate descent.

So both sweeps are the same loop with another coupling matrix and another factor per block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import solve_triangular  # type: ignore[import-untyped]

from ..errors import SplitQuantError
from ..linear_algebra import cholesky_in_place
from ..planning.curves import Salience, diagonal_of

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

DAMPING = 0.1
"""Fraction of :func:`typical_salience` that is added to the diagonal of H, unless another is given."""


_SLAB, _SWAPPED = 64, 1 << 18


@dataclass(frozen=True)
class Cluster:
    """Input channels that are quantized into one type.

    Attributes:
        channels: input channel at each position of the file, int64 (columns,).
        sub: columns per scale.
        block: columns per block of the file, a multiple of ``sub``; divides the number of channels.
    """

    channels: NDArray[np.int64]
    sub: int
    block: int


@dataclass(frozen=True)
class BlockFactors:
    """The metric of every (sub-)block of one cluster, in visiting order.

    Attributes:
        low: unit lower-triangular factor: (blocks, sub, sub).
        weight: squared diagonal of that factor: (blocks, sub).
        gram: ``M^T M``: (blocks, sub, sub).
    """

    low: F32
    weight: F32
    gram: F32


@dataclass(frozen=True)
class Sweep:
    """One way of visiting all blocks, in visiting order.

    Attributes:
        coupling: target of a block = weight + ``coupling[block] @ error``; (cols, cols), zero inside a block.
            None where columns do not interact (diagonal H).
        factors: of each cluster.
    """

    coupling: F32 | None
    factors: tuple[BlockFactors, ...]


@dataclass(frozen=True)
class Metric:
    """A layer input's second moments, ready for some clusters.

    Attributes:
        order: input channel that is visited i-th. Clusters come one after the other; blocks, and sub-blocks
            inside them, stay together.
        places: for each cluster, the position in its file that is visited i-th of its columns.
        first: the sweep that quantizes with the later columns still free.
        later: the sweeps that revisit blocks with all others decided; None for a diagonal H, where the
            first one is already the optimum of every block.
    """

    order: NDArray[np.int64]
    places: tuple[NDArray[np.int64], ...]
    first: Sweep
    later: Sweep | None


def visiting_order(salience: NDArray[Any], sub: int, block: int) -> NDArray[np.int64]:
    """Columns in falling order of salience with block membership kept.

    Blocks are ordered by their summed salience, sub-blocks inside a block likewise, columns inside a
    sub-block by their own. ``salience``: (cols,), cols a multiple of ``block``, ``block`` of ``sub``.
    """
    nested = salience.reshape(-1, block // sub, sub)
    index = np.arange(salience.size).reshape(nested.shape)
    inner = np.argsort(-nested, axis=2, kind="stable")
    index = np.take_along_axis(index, inner, axis=2)
    middle = np.argsort(-nested.sum(axis=2), axis=1, kind="stable")
    index = np.take_along_axis(index, middle[:, :, None], axis=1)
    outer = np.argsort(-nested.sum(axis=(1, 2)), kind="stable")
    return index[outer].reshape(-1)


def prepare(moments: NDArray[Any], clusters: Sequence[Cluster], damping: float) -> Metric:
    """Factor the second moments for clusters of blocks.

    Args:
        moments: ``X^T X / n``, float32 or float64 (cols, cols), symmetric; or its diagonal, (cols,), such as
            a llama.cpp importance matrix holds.
        clusters: in the order in which they are quantized; together they hold every channel once. What one
            gets wrong, the later ones make good: the salient channels belong first.
        damping: fraction of :func:`typical_salience` that is added to the diagonal.

    Raises:
        SplitQuantError: NaN, infinity, or a matrix that is far from positive definite.
    """
    diagonal = _salience(moments)
    apart = moments.ndim == 1  # columns do not interact, and no order is better than the file's
    places = tuple(
        np.arange(len(c.channels)) if apart else visiting_order(diagonal[c.channels], c.sub, c.block)
        for c in clusters
    )
    order = np.concatenate([c.channels[place] for c, place in zip(clusters, places, strict=True)])
    damped = (diagonal + damping * typical_salience(diagonal))[order]
    if apart:
        return Metric(order, places, _diagonal_sweep(damped, clusters), None)
    root = np.sqrt(damped)
    scaled = _unit_diagonal(moments, order, root)
    factor = _reverse_cholesky(scaled)
    first = _triangular_sweep(factor, root, clusters)
    return Metric(order, places, first, _descent_sweep(scaled, root, clusters))


def typical_salience(salience: NDArray[Any]) -> float:
    """Geometric mean of the channels' second moments: few massive channels do not move it."""
    largest = float(salience.max(initial=0.0))
    if largest == 0:
        return 1.0  # an input that is always zero: every column counts the same
    logs = np.log(np.maximum(salience.astype(np.float64), 1e-9 * largest))
    # the last bits of exp and log differ between processors
    return float(np.float32(np.exp(logs.mean())))


def _salience(moments: NDArray[Any]) -> F64:
    diagonal = diagonal_of(moments).astype(np.float64)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise SplitQuantError("second moments", "NaN, infinite or negative", "calibrate again")
    return diagonal


def _unit_diagonal(moments: NDArray[Any], order: NDArray[np.int64], root: F64) -> F32:
    """The moments in ``order``, scaled: what single precision then loses is relative to each column's own
    size, and inputs with massive activations stay factorable."""
    source, divisor = np.asarray(moments), root.astype(np.float32)
    scaled = np.empty(source.shape, np.float32)
    # some rows at a time: wide inputs have matrices of hundreds of megabytes, and fresh memory is slow
    for start in range(0, len(scaled), _SLAB):
        rows = slice(start, start + _SLAB)
        gathered = source[order[rows]].astype(np.float32, copy=False)
        np.take(gathered, order, axis=1, out=scaled[rows], mode="clip")
        scaled[rows] /= divisor[rows, None]
        scaled[rows] /= divisor
    np.fill_diagonal(scaled, 1.0)
    return scaled


def _reverse_cholesky(matrix: F32) -> F32:
    """Lower triangular M with ``matrix = M^T M``: the Cholesky factor of the reversed matrix, reversed."""
    for extra in (0.0, 1e-4, 1e-2):
        turned = np.ascontiguousarray(matrix[::-1, ::-1])
        turned[np.diag_indices_from(turned)] += np.float32(extra)
        if cholesky_in_place(turned):
            _turn(turned)
            return turned
        # otherwise rounding made the smallest eigenvalue negative
    raise SplitQuantError("second moments", "not positive definite", "calibrate again with more text")


def _turn(matrix: F32) -> None:
    """Reverse the order of rows and of columns, in place."""
    values = matrix.reshape(-1)
    size = len(values)
    for start in range(0, size // 2, _SWAPPED):
        stop = min(start + _SWAPPED, size // 2)
        front, back = values[start:stop], values[size - stop : size - start]
        kept = front.copy()
        front[:] = back[::-1]
        back[:] = kept[::-1]


def _spans(clusters: Sequence[Cluster]) -> Iterator[tuple[slice, int]]:
    """Each cluster's columns in visiting order, and its columns per scale."""
    start = 0
    for cluster in clusters:
        stop = start + len(cluster.channels)
        yield slice(start, stop), cluster.sub
        start = stop


def _block_factors(factors: NDArray[Any]) -> BlockFactors:
    """From lower triangular factors (blocks, sub, sub)."""
    diagonal = np.diagonal(factors, axis1=1, axis2=2)
    low = factors / diagonal[:, :, None]
    gram = factors.transpose(0, 2, 1) @ factors
    return BlockFactors(low.astype(np.float32), (diagonal**2).astype(np.float32), gram.astype(np.float32))


def _diagonal_blocks(matrix: NDArray[Any], span: slice, sub: int) -> F64:
    blocks = [matrix[i : i + sub, i : i + sub] for i in range(span.start, span.stop, sub)]
    return np.stack(blocks).astype(np.float64)


def _diagonal_sweep(diagonal: F64, clusters: Sequence[Cluster]) -> Sweep:
    parts = []
    for span, sub in _spans(clusters):
        factors = np.sqrt(diagonal[span]).reshape(-1, sub)[:, :, None] * np.eye(sub)
        parts.append(_block_factors(factors))
    return Sweep(None, tuple(parts))


def _triangular_sweep(factor: F32, root: F64, clusters: Sequence[Cluster]) -> Sweep:
    """First sweep from the factor of the scaled matrix; ``factor`` is overwritten by the coupling."""
    parts = []
    for span, sub in _spans(clusters):
        factors = _diagonal_blocks(factor, span, sub) * root[span].reshape(-1, sub)[:, None, :]
        for b, inverse in enumerate(np.linalg.inv(factors)):
            rows = slice(span.start + b * sub, span.start + (b + 1) * sub)
            factor[rows, : rows.start] = inverse.astype(np.float32) @ factor[rows, : rows.start]
            factor[rows, rows] = 0
        parts.append(_block_factors(factors))
    factor *= root.astype(np.float32)[None, :]
    return Sweep(factor, tuple(parts))


def _descent_sweep(scaled: F32, root: F64, clusters: Sequence[Cluster]) -> Sweep:
    """Later sweeps from the scaled matrix, which is overwritten by the coupling."""
    parts = []
    for span, sub in _spans(clusters):
        scale = root[span].reshape(-1, sub)
        metric = _diagonal_blocks(scaled, span, sub) * scale[:, :, None] * scale[:, None, :]
        flipped = np.linalg.cholesky(metric[:, ::-1, ::-1])
        factors = flipped[:, ::-1, ::-1].transpose(0, 2, 1)
        for b, inverse in enumerate(np.linalg.inv(metric) * scale[:, None, :]):
            rows = slice(span.start + b * sub, span.start + (b + 1) * sub)
            scaled[rows] = inverse.astype(np.float32) @ scaled[rows]
            scaled[rows, rows] = 0
        parts.append(_block_factors(factors))
    scaled *= root.astype(np.float32)[None, :]
    return Sweep(scaled, tuple(parts))


@dataclass(frozen=True)
class Feedback:
    """What rounding errors of a weight's columns become under error feedback.

    With ``H = M^T M`` (:func:`prepare`), feedback makes of independent errors ``e`` of the columns the error
    matrix ``e D M^-T``, D the diagonal of M: as little of it as possible falls where the input is strong.

    Attributes:
        order: input channel that is visited i-th, (cols,).
        spread: D, (cols,): its square is what is left of a channel's second moment once the later ones make
            good what they can. Rounding the channels costs ``sum_i (spread_i * e_i)**2``.
        root: square root of the damped diagonal, in ``order``.
        factor: M of the moments scaled to a unit diagonal; None where they are only a diagonal.
    """

    order: NDArray[np.int64]
    spread: F64
    root: F64
    factor: F32 | None

    @classmethod
    def of(
        cls, moments: NDArray[Any], order: NDArray[np.int64] | None = None, damping: float = DAMPING
    ) -> Feedback:
        """Factor second moments. Arguments and errors are those of :func:`prepare`; by default the most
        salient channel is visited first."""
        salience = _salience(moments)
        if order is None:
            order = np.argsort(-salience, kind="stable")
        root = np.sqrt((salience + damping * typical_salience(salience))[order])
        if moments.ndim == 1:
            return cls(order, root, root, None)
        factor = _reverse_cholesky(_unit_diagonal(moments, order, root))
        return cls(order, np.diagonal(factor).astype(np.float64) * root, root, factor)

    @property
    def salience(self) -> Salience:
        """Of the channels, as planning counts it."""
        return Salience(self.order, self.spread**2)

    def outputs_of(self, inputs: F32) -> F32:
        """``D M^-T x`` for every row x of ``inputs``, float32 (tokens, cols) in and out: what the errors of
        the columns, in visiting order, are multiplied with."""
        scaled: Any = inputs[:, self.order] / self.root.astype(np.float32)
        if self.factor is not None:
            scaled = solve_triangular(self.factor, scaled.T, trans="T", lower=True, check_finite=False).T
        result: F32 = scaled * self.spread.astype(np.float32)
        return result
