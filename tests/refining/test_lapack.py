"""The factorization is LAPACK's, and other threads get on meanwhile."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from scipy.linalg.lapack import spotrf

from gguf_splitquant.refining.lapack import cholesky_in_place


def positive_definite(n: int) -> np.ndarray:
    x = np.random.default_rng(n).standard_normal((n, n)).astype(np.float32)
    return x @ x.T + np.float32(n) * np.eye(n, dtype=np.float32)


@pytest.mark.parametrize("n", [1, 2, 255, 256, 257, 700])
def test_it_is_scipys_factor_to_the_last_bit(n: int) -> None:
    matrix = positive_definite(n)
    expected, _ = spotrf(matrix.T, lower=1, clean=1)
    factor = matrix.copy()
    assert cholesky_in_place(factor)
    np.testing.assert_array_equal(factor, expected.T)
    np.testing.assert_allclose(factor.T @ factor, matrix, rtol=1e-4, atol=1e-3 * n)


def test_a_matrix_that_is_not_positive_definite_is_told() -> None:
    assert not cholesky_in_place(np.array([[1, 2], [2, 1]], np.float32))


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), np.eye(4, dtype=np.float32)[:, ::2], np.asfortranarray(np.ones((3, 3), np.float32))],
)
def test_other_arrays_are_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match="float32 in C order"):
        cholesky_in_place(matrix)


def test_other_threads_get_on() -> None:
    matrix = positive_definite(3000)
    thread = threading.Thread(target=cholesky_in_place, args=(matrix,))
    turns = 0
    thread.start()
    while thread.is_alive():
        time.sleep(0.0005)
        turns += 1
    assert turns > 10
