"""What error feedback needs to know about a layer's input, prepared once for all weights that read it.

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

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg.lapack import spotrf  # type: ignore[import-untyped]

from ..errors import SplitQuantError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Sweep:
    """One way of visiting all blocks, in visiting order.

    Attributes:
        coupling: target of a block = weight + ``coupling[block] @ error``; (cols, cols), zero inside a block.
            None where columns do not interact (diagonal H).
        low: unit lower-triangular factor of each block's metric: (blocks, sub, sub).
        weight: squared diagonal of that factor: (blocks, sub).
        gram: the block's metric ``M^T M``: (blocks, sub, sub).
    """

    coupling: F32 | None
    low: F32
    weight: F32
    gram: F32


@dataclass(frozen=True)
class Metric:
    """A layer input's second moments, ready for one block geometry.

    Attributes:
        order: column of the file that is visited i-th. Blocks, and sub-blocks inside them, stay together.
        first: the sweep that quantizes with the later columns still free.
        later: the sweeps that revisit blocks with all others decided; None for a diagonal H, where the
            first one is already the optimum of every block.
    """

    order: NDArray[np.int64]
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


def prepare(moments: NDArray[Any], sub: int, block: int, damping: float) -> Metric:
    """Factor the second moments for blocks of ``block`` columns with a scale per ``sub``.

    Args:
        moments: ``X^T X / n``, float32 or float64 (cols, cols), symmetric; or its diagonal, (cols,), such as
            a llama.cpp importance matrix holds.
        sub: columns per scale.
        block: columns per block of the file.
        damping: fraction of the mean diagonal that is added to the diagonal.

    Raises:
        SplitQuantError: NaN, infinity, or a matrix that is far from positive definite.
    """
    diagonal = np.asarray(moments if moments.ndim == 1 else np.diagonal(moments), dtype=np.float64)
    if not np.isfinite(diagonal).all() or (diagonal < 0).any():
        raise SplitQuantError("second moments", "NaN, infinite or negative", "calibrate again")
    mean = float(diagonal.mean()) or 1.0  # an input that is always zero: every column counts the same
    order = visiting_order(diagonal, sub, block)
    damped = (diagonal + damping * mean)[order]
    if moments.ndim == 1:
        return Metric(order, _diagonal_sweep(damped, sub), None)
    # Unit diagonal first: what single precision then loses is relative to each column's own size, and
    # inputs with massive activations stay factorable.
    root = np.sqrt(damped)
    scaled = moments[np.ix_(order, order)].astype(np.float32)
    scaled /= root.astype(np.float32)[:, None]
    scaled /= root.astype(np.float32)[None, :]
    np.fill_diagonal(scaled, 1.0)
    factor = _reverse_cholesky(scaled)
    return Metric(order, _triangular_sweep(factor, root, sub), _descent_sweep(scaled, root, sub))


def _reverse_cholesky(matrix: F32) -> F32:
    """Lower triangular M with ``matrix = M^T M``: the Cholesky factor of the reversed matrix, reversed."""
    for extra in (0.0, 1e-4, 1e-2):
        turned = np.ascontiguousarray(matrix[::-1, ::-1])
        turned[np.diag_indices_from(turned)] += np.float32(extra)
        # Symmetric, so the transposed view is the same matrix, and LAPACK works on it in place. numpy's own
        # cholesky takes eight times as long here.
        lower, failed_at = spotrf(turned.T, lower=1, clean=1, overwrite_a=1)
        if not failed_at:
            return np.ascontiguousarray(lower.T[::-1, ::-1])
        # otherwise rounding made the smallest eigenvalue negative
    raise SplitQuantError("second moments", "not positive definite", "calibrate again with more text")


def _block_factors(factors: NDArray[Any]) -> tuple[F32, F32, F32]:
    """Normalized factor, squared diagonal and metric of lower triangular (blocks, sub, sub)."""
    diagonal = np.diagonal(factors, axis1=1, axis2=2)
    low = factors / diagonal[:, :, None]
    gram = factors.transpose(0, 2, 1) @ factors
    return low.astype(np.float32), (diagonal**2).astype(np.float32), gram.astype(np.float32)


def _diagonal_blocks(matrix: NDArray[Any], sub: int) -> F64:
    count = len(matrix) // sub
    view = matrix.reshape(count, sub, count, sub)
    return np.stack([view[b, :, b, :] for b in range(count)]).astype(np.float64)


def _diagonal_sweep(diagonal: F64, sub: int) -> Sweep:
    factors = np.sqrt(diagonal).reshape(-1, sub)[:, :, None] * np.eye(sub)
    return Sweep(None, *_block_factors(factors))


def _triangular_sweep(factor: F32, root: F64, sub: int) -> Sweep:
    """First sweep from the factor of the scaled matrix; ``factor`` is overwritten by the coupling."""
    scale = root.reshape(-1, sub)
    factors = _diagonal_blocks(factor, sub) * scale[:, None, :]
    inverses = np.linalg.inv(factors)
    for b, inverse in enumerate(inverses):
        rows = slice(b * sub, (b + 1) * sub)
        factor[rows, : rows.start] = inverse.astype(np.float32) @ factor[rows, : rows.start]
        factor[rows, rows] = 0
    factor *= root.astype(np.float32)[None, :]
    return Sweep(factor, *_block_factors(factors))


def _descent_sweep(scaled: F32, root: F64, sub: int) -> Sweep:
    """Later sweeps from the scaled matrix, which is overwritten by the coupling."""
    scale = root.reshape(-1, sub)
    metric = _diagonal_blocks(scaled, sub) * scale[:, :, None] * scale[:, None, :]
    flipped = np.linalg.cholesky(metric[:, ::-1, ::-1])
    factors = flipped[:, ::-1, ::-1].transpose(0, 2, 1)
    inverses = np.linalg.inv(metric) * scale[:, None, :]
    for b, inverse in enumerate(inverses):
        rows = slice(b * sub, (b + 1) * sub)
        scaled[rows] = inverse.astype(np.float32) @ scaled[rows]
        scaled[rows, rows] = 0
    scaled *= root.astype(np.float32)[None, :]
    return Sweep(scaled, *_block_factors(factors))
