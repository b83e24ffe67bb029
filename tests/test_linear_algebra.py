"""What is called by its pointer computes what SciPy's function does, and other threads get on meanwhile."""

from __future__ import annotations

import threading
import time
from itertools import pairwise

import numpy as np
import pytest
from scipy.linalg.lapack import spotrf

from gguf_splitquant.linear_algebra import add_gram_rows, cholesky_in_place


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


@pytest.mark.parametrize("edges", [(0, 300), (0, 128, 300), (0, 1, 257, 299, 300)])
def test_strips_make_the_upper_triangle_of_the_gram_matrix(edges: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    rows = rng.standard_normal((40, 300)).astype(np.float32)
    before = rng.standard_normal((300, 300)).astype(np.float32)
    matrix = before.copy()
    for start, stop in pairwise(edges):
        add_gram_rows(matrix, rows, start, stop)
    upper = np.triu_indices(300)
    np.testing.assert_allclose(matrix[upper], (before + rows.T @ rows)[upper], rtol=1e-4, atol=1e-4)
    below = [(i, j) for a, b in pairwise(edges) for i in range(a, b) for j in range(a)]
    for i, j in below:
        assert matrix[i, j] == before[i, j]


def test_strips_outside_of_the_matrix_are_refused() -> None:
    matrix, rows = np.zeros((8, 8), np.float32), np.zeros((3, 8), np.float32)
    for start, stop, x in ((0, 9, rows), (-1, 4, rows), (4, 4, rows), (0, 8, rows[:, :4])):
        with pytest.raises(ValueError, match="rows"):
            add_gram_rows(matrix, x, start, stop)


@pytest.mark.parametrize(
    "matrix",
    [np.eye(3), np.eye(4, dtype=np.float32)[:, ::2], np.asfortranarray(np.ones((3, 3), np.float32))],
)
def test_other_arrays_are_refused(matrix: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"float32 in C order|no square"):
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
