"""BLAS and LAPACK without holding the interpreter, and with as many threads as is said.

SciPy's wrappers of ``spotrf`` and ``sgemm`` keep the interpreter's lock for as long as they compute, seconds
for a wide input: no other thread gets on. The same functions are called here through the pointers that SciPy
offers for them (``scipy.linalg.cython_lapack``), and ctypes lets go of the lock.

Threads of our own, each with single-threaded BLAS, are better than BLAS' own: sums do not depend on their
number, and none of them waits in a loop while llama.cpp wants the core.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_blas, cython_lapack  # type: ignore[import-untyped]
from threadpoolctl import ThreadpoolController

F32 = NDArray[np.float32]

_ROWS = 256


@contextmanager
def blas_threads(count: int) -> Iterator[None]:
    """Linear algebra with so many threads; a setting of the whole process."""
    with _libraries().limit(limits=count, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    """NumPy's and SciPy's, both loaded by now. Looking for them takes milliseconds."""
    return ThreadpoolController()


def cholesky_in_place(matrix: F32) -> bool:
    """Overwrite a symmetric matrix with its factor: upper triangular ``U``, ``matrix = U^T U`` (``spotrf``).

    Args:
        matrix: float32 (n, n), C-contiguous. Only its upper triangle is read.

    Returns:
        False if it is not positive definite; what it holds then means nothing.
    """
    if matrix.shape != (len(matrix), len(matrix)):
        raise ValueError(f"{matrix.shape} is no square matrix")
    n, failed_at = ctypes.c_int(len(matrix)), ctypes.c_int(0)
    # LAPACK counts columns first: its lower triangle is the upper one here
    _spotrf()(b"L", ctypes.byref(n), _address(matrix), ctypes.byref(n), ctypes.byref(failed_at))
    if failed_at.value:
        return False
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        matrix[rows, :start] = 0
        matrix[rows, rows] = np.triu(matrix[rows, rows])
    return True


def add_gram_rows(matrix: F32, rows: F32, start: int, stop: int) -> None:
    """``matrix[start:stop, start:] += (rows^T rows)[start:stop, start:]`` (``sgemm``).

    The upper triangle in strips, for threads to share; of the lower one what lies in a strip's square.

    Args:
        matrix: float32 (n, n), C-contiguous.
        rows: float32 (rows, n), C-contiguous.
    """
    if matrix.shape != (rows.shape[1], rows.shape[1]) or not 0 <= start < stop <= len(matrix):
        raise ValueError(f"rows {start} to {stop} of {matrix.shape} from {rows.shape}")
    n, right, height, depth = (
        ctypes.c_int(v) for v in (len(matrix), len(matrix) - start, stop - start, len(rows))
    )
    one = ctypes.byref(ctypes.c_float(1))
    x = _address(rows, start)
    width = ctypes.byref(n)
    # BLAS counts columns first: everything is transposed
    _sgemm()(
        b"N",
        b"T",
        ctypes.byref(right),
        ctypes.byref(height),
        ctypes.byref(depth),
        one,
        x,
        width,
        x,
        width,
        one,
        _address(matrix, start * len(matrix) + start),
        width,
    )


def _address(matrix: F32, offset: int = 0) -> Any:
    """Where the value number ``offset`` lies."""
    if matrix.dtype != np.float32 or not matrix.flags.c_contiguous:
        raise ValueError(f"{matrix.dtype} {matrix.shape} is no matrix of float32 in C order")
    return ctypes.cast(matrix.ctypes.data + 4 * offset, _SINGLE)


_INTEGER, _SINGLE = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_float)


@cache
def _spotrf() -> Any:
    return _function(cython_lapack, "spotrf", ctypes.c_char_p, _INTEGER, _SINGLE, _INTEGER, _INTEGER)


@cache
def _sgemm() -> Any:
    matrix = _SINGLE, _INTEGER
    shape = _INTEGER, _INTEGER, _INTEGER
    turned = ctypes.c_char_p, ctypes.c_char_p
    return _function(cython_blas, "sgemm", *turned, *shape, _SINGLE, *matrix, *matrix, _SINGLE, *matrix)


def _function(module: ModuleType, name: str, *arguments: Any) -> Any:
    capsule = module.__pyx_capi__[name]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    return ctypes.CFUNCTYPE(None, *arguments)(address)
