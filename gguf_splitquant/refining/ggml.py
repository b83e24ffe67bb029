"""Types that error feedback does not write go through ggml's own quantizer, with our importance.

These are the codebook types (IQ1 to IQ3): their search is ggml's, ``ggml_quantize_chunk`` of ggml-quants.c,
called in the library that llama-cpp-python loads.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import RecipeError
from ..runtime.library import load_llama_cpp

_SLAB = 256


def quantize_with_ggml(
    weight: NDArray[np.float32],
    qtype: GGMLQuantizationType,
    importance: NDArray[np.float32],
    threads: int,
) -> NDArray[np.uint8]:
    """Quantize the rows of a weight.

    Args:
        weight: float32 (rows, cols).
        qtype: any ggml type whose blocks divide the columns.
        importance: of the columns, positive, float32 (cols,).
        threads: slabs of rows in work at a time.

    Returns:
        uint8 (rows, bytes per row).

    Raises:
        EngineError: there is no library.
        RecipeError: the blocks do not divide the columns.
    """
    rows, columns = weight.shape
    block, size = GGML_QUANT_SIZES[qtype]
    if columns % block:
        raise RecipeError(qtype.name, f"rows of {columns} values are not whole blocks of {block}")
    function = load_llama_cpp().llama_cpp._lib.ggml_quantize_chunk
    function.restype = ctypes.c_size_t
    function.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    weight = np.ascontiguousarray(weight, np.float32)
    importance = np.ascontiguousarray(importance, np.float32)
    packed = np.empty((rows, columns // block * size), np.uint8)

    def work(start: int) -> None:
        count = min(_SLAB, rows - start)
        source, target = weight[start:], packed[start:]
        function(
            int(qtype), source.ctypes.data, target.ctypes.data, 0, count, columns, importance.ctypes.data
        )

    work(0)  # the first call makes the codebook's tables, and not for several threads at once
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(_SLAB, rows, _SLAB)))
    return packed
