"""Golden: what gguf-py and ggml's C code decode from our blocks is what the reference quantizer says."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.packing import ENCODINGS, LinearEncoding, choose_encoding, decode, fit_grid, quantize
from gguf_splitquant.recipe import Granularity

_ENCODINGS = {f"INT{e.bits}-{e.qtype.name}": e for e in ENCODINGS}


def random_blocks(encoding: LinearEncoding, seed: int, rows: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """Packed rows, and the values that the reference decodes: groups of every sign, and of zeros."""
    rng = np.random.default_rng(seed)
    width, blocks = encoding.block_columns, 3
    values = (rng.standard_t(3, (rows, blocks, width)) * 10.0 ** rng.uniform(-3, 1)).astype(np.float32)
    values[0] = np.abs(values[0])
    values[1] = -np.abs(values[1])
    values[2, 0] = 0
    grid = fit_grid(values.min(axis=2), values.max(axis=2), encoding.bits, scale_bits=encoding.scale_bits)
    codes = quantize(values, grid[..., np.newaxis])
    packed = encoding.pack(codes.reshape(rows, -1), grid)
    return packed, decode(codes, grid[..., np.newaxis]).reshape(rows, -1)


@pytest.mark.parametrize("name", _ENCODINGS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gguf_py_decodes_the_reference_exactly(name: str, seed: int) -> None:
    packed, expected = random_blocks(_ENCODINGS[name], seed)
    np.testing.assert_array_equal(quants.dequantize(packed, _ENCODINGS[name].qtype), expected)


@pytest.mark.engine
@pytest.mark.parametrize("name", _ENCODINGS)
def test_ggml_decodes_the_reference_exactly(name: str, ggml_base: ctypes.CDLL) -> None:
    encoding = _ENCODINGS[name]
    packed, expected = random_blocks(encoding, seed=1)
    decoded = np.empty(expected.shape, np.float32)
    # ggml's names: dequantize_row_q8_0, dequantize_row_q4_K
    function = getattr(ggml_base, f"dequantize_row_{encoding.qtype.name.replace('Q', 'q')}")
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    function(packed.ctypes.data, decoded.ctypes.data, decoded.size)
    np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize(
    ("bits", "columns", "granularity", "carrier"),
    [
        (8, 64, "tensor", GGMLQuantizationType.Q8_0),
        (4, 512, "tensor", GGMLQuantizationType.Q4_K),
        (4, 512, "row", GGMLQuantizationType.Q4_K),
        (4, 512, "block", GGMLQuantizationType.Q4_1),
        (4, 288, "tensor", GGMLQuantizationType.Q4_1),
        (2, 256, "block", GGMLQuantizationType.Q2_K),
        (2, 96, "row", GGMLQuantizationType.Q4_1),
    ],
)
def test_smallest_carrier_that_fits(
    bits: int, columns: int, granularity: Granularity, carrier: GGMLQuantizationType
) -> None:
    encoding = choose_encoding(bits, columns, granularity)
    assert encoding is not None
    assert (encoding.bits, encoding.qtype) == (bits, carrier)


def test_rows_that_fill_no_block_have_no_carrier() -> None:
    assert choose_encoding(4, 100, "tensor") is None
    with pytest.raises(ValueError, match="100 columns"):
        ENCODINGS[0].pack(np.zeros((1, 100), np.int8), fit_grid(np.zeros((1, 1)), np.zeros((1, 1)), 8))
