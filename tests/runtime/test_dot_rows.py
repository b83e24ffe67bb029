"""The patch multiplies several rows with one token at a time: every type, any number of rows and blocks."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from gguf_splitquant.runtime.library import load_llama_cpp

pytestmark = pytest.mark.engine

_Q8_K = np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)])
"""``block_q8_K`` (ggml-common.h)."""

_SCALES = {Type.IQ4_XS: [0], Type.Q5_K: [0, 2], Type.Q6_K: [208], Type.Q4_K: [0, 2]}
"""Where the halves that scale a block lie: any other byte may have any value."""


@pytest.fixture(scope="module")
def library() -> Any:
    library = load_llama_cpp().llama_cpp._lib
    library.ggml_cpu_init()  # the table of half precision
    return library


def rows_of(kind: Type, rows: int, columns: int, random: np.random.Generator) -> NDArray[np.uint8]:
    """Blocks of any bits, with scales that are numbers."""
    block, size = GGML_QUANT_SIZES[kind]
    packed = random.integers(0, 256, (rows, columns // block, size), np.uint8)
    for place in _SCALES[kind]:
        scales = random.uniform(-1, 1, packed.shape[:2]).astype("<f2")
        packed[..., place : place + 2] = scales[..., None].view(np.uint8)
    return packed.reshape(rows, -1)


@pytest.mark.parametrize("columns", [256, 512, 1536, 256 * 33])
@pytest.mark.parametrize("rows", [1, 3, 4, 9])
@pytest.mark.parametrize("kind", _SCALES, ids=lambda kind: kind.name)
def test_sums_are_those_of_the_decoded_values(library: Any, kind: Type, rows: int, columns: int) -> None:
    """IQ4_XS and Q5_K have loops of their own where the processor has AVX-512."""
    random = np.random.default_rng(rows * columns)
    packed = rows_of(kind, rows, columns, random)
    values = random.standard_normal(columns).astype(np.float32)
    values[:3] = 9, -9, 9  # the largest codes
    token = np.zeros(columns // 256, _Q8_K)
    library.quantize_row_q8_K(
        ctypes.c_void_p(values.ctypes.data), ctypes.c_void_p(token.ctypes.data), ctypes.c_int64(columns)
    )
    before = random.standard_normal(rows + 1).astype(np.float32)
    sums = before.copy()
    library.ggml_cpu_add_dot_rows(
        int(kind),
        columns,
        rows,
        ctypes.c_void_p(sums.ctypes.data),
        ctypes.c_void_p(packed.ctypes.data),
        ctypes.c_size_t(packed.shape[1]),
        ctypes.c_void_p(token.ctypes.data),
    )
    decoded = quants.dequantize(packed, kind).astype(np.float64)
    read = (token["d"][:, None].astype(np.float64) * token["qs"]).ravel()
    size = np.abs(decoded) @ np.abs(read)
    assert np.all(np.abs(sums[:-1] - before[:-1] - decoded @ read) < 1e-6 * size + 1e-5)
    assert sums[-1] == before[-1]  # one row more is not touched
