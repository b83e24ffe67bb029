"""What llama.cpp shows of its graph: the C structure behind an address, as numpy arrays.

llama-cpp-python passes a node of the graph as a bare address. The structure is the one of the pinned
llama.cpp (``struct ggml_tensor``, ggml.h); every address is checked by the name that it should carry before
anything is believed.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .experts import Routing

F32_TYPE, I32_TYPE = 0, 26
"""``GGML_TYPE_F32`` and ``GGML_TYPE_I32``."""

NO_OPERATION = 0
"""``GGML_OP_NONE``."""


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    )


def tensor_at(address: int) -> Tensor:
    """The tensor at an address that llama.cpp gave."""
    return Tensor.from_address(address)


def address_of(tensor: Tensor) -> int:
    """Where a tensor is."""
    return ctypes.addressof(tensor)


def rows_of(tensor: Tensor) -> NDArray[np.float32]:
    """The tensor's data as (rows, channels), without copying."""
    channels, *outer = (int(n) for n in tensor.ne)
    if tensor.nb[0] != 4 or tensor.nb[1] != 4 * channels or not tensor.data:
        raise EngineError(tensor.name.decode(), "the input of a matrix product is not stored row by row")
    count = int(np.prod(outer))
    buffer = (ctypes.c_float * (count * channels)).from_address(tensor.data)
    rows: NDArray[np.float32] = np.ctypeslib.as_array(buffer).reshape(count, channels)
    return rows


def routing_of(node: Tensor) -> Routing | None:
    """Which experts a product with a stack of experts uses (``ggml_mul_mat_id``); None for other products.

    In ggml, fastest axis first: identifiers [experts per token, tokens]; input [channels, b, tokens] with
    b either 1 (all experts of a token read the same) or the number of experts per token.
    """
    if not node.src[2] or tensor_at(node.src[2]).type != I32_TYPE:
        return None
    ids, source = tensor_at(node.src[2]), tensor_at(node.src[1])
    per_token, tokens = ids.ne[0], ids.ne[1]
    rows_per_token = source.ne[1]
    fits = source.ne[2] == tokens and rows_per_token in (1, per_token)
    if ids.nb[0] != 4 or not ids.data or not fits:
        raise EngineError(tensor_at(node.src[0]).name.decode(), "its experts are chosen in an unknown form")
    # a view of the sorted probabilities: there are more columns than those that count
    stride = ids.nb[1] // 4
    buffer = (ctypes.c_int32 * (stride * (tokens - 1) + per_token)).from_address(ids.data)
    flat: NDArray[np.int32] = np.ctypeslib.as_array(buffer)
    chosen = np.lib.stride_tricks.as_strided(flat, (tokens, per_token), (ids.nb[1], 4))
    experts = chosen.reshape(tokens * rows_per_token, per_token // rows_per_token).copy()
    return Routing(experts, int(tensor_at(node.src[0]).ne[2]))
