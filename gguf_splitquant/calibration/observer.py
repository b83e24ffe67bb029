"""Read the inputs of matrix products while llama.cpp computes them.

llama.cpp offers every node of its graph to an evaluation callback (``cb_eval`` of ``llama_context_params``):
first it asks whether the node is of interest, then, once computed, hands it over. llama-cpp-python passes
the node as a bare address; this module knows the C structure behind it and turns the input of a matrix
product into a numpy array. The structure is the one of the pinned llama.cpp (``struct ggml_tensor``,
ggml.h); every address is checked by the name that it should carry before anything is believed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EngineError
from ..runtime.deferral import DeferredSignals
from ..runtime.engine import Engine, EngineOptions
from .experts import Routing
from .names import HEAD

Sink = Callable[[str, NDArray[np.float32], Routing | None], None]
"""Receives the name of the weight, its input, float32 (rows, channels), valid during the call only, and for a
stack of experts, which of them multiply which rows."""

_HEAD_INPUT = "result_norm"
_F32, _I32 = 0, 26  # GGML_TYPE_F32, GGML_TYPE_I32
_WEIGHT_SUFFIX = b".weight"


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
    if not node.src[2] or tensor_at(node.src[2]).type != _I32:
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


class ObservedEngine(Engine):
    """An :class:`Engine` that shows the inputs of all linear layers to a sink.

    Every sequence has its own part of the KV cache (``options.n_ctx / options.n_sequences`` cells), so many
    short sequences cost no more attention than one. Weights that read the same tensor (q, k, v; gate, up)
    are reported once: :attr:`sharing` maps each weight to the one it is reported under.
    """

    def __init__(self, path: Path | str, options: EngineOptions, sink: Sink | None = None) -> None:
        self.sharing: dict[str, str] = {}
        self._sink = sink
        self._failure: BaseException | None = None
        self._wants_logits = False
        self._reported: dict[int, str] = {}
        self._callback: Any = None
        self._signals = DeferredSignals()
        super().__init__(path, options)

    def __enter__(self) -> ObservedEngine:
        return self

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.kv_unified = False
        if self._sink is not None:
            self._callback = self._lib.llama_cpp.ggml_backend_sched_eval_callback(self._visit)
            params.cb_eval = self._callback
        return params

    def is_text(self, token: int) -> bool:
        """``token`` is a piece of text: not control, unknown, unused or a single byte."""
        lib = self._lib
        other = (
            lib.LLAMA_TOKEN_ATTR_UNKNOWN
            | lib.LLAMA_TOKEN_ATTR_UNUSED
            | lib.LLAMA_TOKEN_ATTR_CONTROL
            | lib.LLAMA_TOKEN_ATTR_BYTE
        )
        return not int(lib.llama_vocab_get_attr(self._vocab, token)) & other

    def decode(
        self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike, outputs: ArrayLike
    ) -> NDArray[np.float32]:
        """See :meth:`Engine.decode`; the sink is shown the inputs of all layers on the way.

        Raises:
            EngineError: llama.cpp refused the batch; whatever the sink raised is raised again.
        """
        self._reported.clear()
        self._wants_logits = True
        try:
            with self._signals:
                return super().decode(tokens, positions, sequences, outputs)
        finally:
            self._wants_logits = False
            self._raise_failure()

    def observe(self, tokens: ArrayLike, positions: ArrayLike, sequences: ArrayLike) -> None:
        """Run one batch through the model for the sink's sake; no logits are computed.

        Raises:
            EngineError: llama.cpp refused the batch; whatever the sink raised is raised again.
        """
        self._reported.clear()
        # All positions count as outputs: for others llama.cpp skips the end of the last layer
        self._batch.fill(tokens, positions, sequences, True)
        with self._signals:
            status = self._lib.llama_decode(self._context, self._batch.struct)
        self._raise_failure()
        if status != 0:
            raise EngineError(self.path, f"llama.cpp cannot run the calibration text ({status})")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _visit(self, address: int, ask: bool, user_data: Any) -> bool:
        if self._signals.pending is not None:
            return ask  # a node that was asked for and is not wanted after all ends the computation
        return self._on_node(address, ask, user_data)

    def _on_node(self, address: int, ask: bool, _user_data: Any) -> bool:
        # An exception must not cross the C frames between here and the caller
        try:
            node = tensor_at(address)
            if node.name == _HEAD_INPUT.encode():
                if not ask and self._sink is not None:
                    self.sharing[HEAD] = HEAD
                    self._sink(HEAD, rows_of(node), None)
                # after this node False ends the computation: the head itself is seldom needed
                return ask or self._wants_logits
            if ask:
                return self._wants(node)
            self._report(node)
            return True
        except BaseException as failure:
            self._failure = failure
            return False

    def _wants(self, node: Tensor) -> bool:
        if not node.src[0] or not node.src[1]:
            return False
        weight, source = tensor_at(node.src[0]), tensor_at(node.src[1])
        if not weight.name.endswith(_WEIGHT_SUFFIX) or source.type != _F32 or weight.ne[0] != source.ne[0]:
            return False
        if weight.ne[1] <= 1 or weight.name == b"token_embd.weight" or weight.name == HEAD.encode():
            return False
        name = weight.name.decode()
        seen = self._reported.get(node.src[1])
        if seen is not None:
            self.sharing.setdefault(name, seen)
            return False
        self._reported[node.src[1]] = name
        return True

    def _report(self, node: Tensor) -> None:
        name = tensor_at(node.src[0]).name.decode()
        self.sharing.setdefault(name, name)
        if self._sink is not None:
            self._sink(name, rows_of(tensor_at(node.src[1])), routing_of(node))
