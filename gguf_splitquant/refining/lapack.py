"""LAPACK's Cholesky factorization without holding the interpreter.

``scipy.linalg.lapack.spotrf`` keeps the interpreter's lock for as long as it computes, seconds for a wide
input: no other thread gets on. The same function is called here through the pointer that SciPy offers for it
(``scipy.linalg.cython_lapack``), and ctypes lets go of the lock.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cython_lapack  # type: ignore[import-untyped]

F32 = NDArray[np.float32]

_ROWS = 256


def cholesky_in_place(matrix: F32) -> bool:
    """Overwrite a symmetric matrix with its factor: upper triangular ``U``, ``matrix = U^T U`` (``spotrf``).

    Args:
        matrix: float32 (n, n), C-contiguous. Only its upper triangle is read.

    Returns:
        False if it is not positive definite; what it holds then means nothing.
    """
    if matrix.dtype != np.float32 or not matrix.flags.c_contiguous or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"{matrix.dtype} {matrix.shape} is no square matrix of float32 in C order")
    n, failed_at = ctypes.c_int(len(matrix)), ctypes.c_int(0)
    # LAPACK counts columns first: its lower triangle is the upper one here
    data = matrix.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    _spotrf()(b"L", ctypes.byref(n), data, ctypes.byref(n), ctypes.byref(failed_at))
    if failed_at.value:
        return False
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        matrix[rows, :start] = 0
        matrix[rows, rows] = np.triu(matrix[rows, rows])
    return True


@cache
def _spotrf() -> Any:
    capsule = cython_lapack.__pyx_capi__["spotrf"]
    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    address = api.PyCapsule_GetPointer(capsule, api.PyCapsule_GetName(capsule))
    integer, single = ctypes.POINTER(ctypes.c_int), ctypes.POINTER(ctypes.c_float)
    return ctypes.CFUNCTYPE(None, ctypes.c_char_p, integer, single, integer, integer)(address)
