"""Read the inputs of matrix products while llama.cpp computes them.

llama.cpp offers every node of its graph to an evaluation callback (``cb_eval`` of ``llama_context_params``):
first it asks whether the node is of interest, then, once computed, hands it over
(``ggml_backend_sched_compute_splits``, ggml-backend.cpp). The first is also the time to put weights in place
that are not in the model's file (:mod:`.lent_weights`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import EngineError
from ..runtime.deferral import DeferredSignals
from ..runtime.engine import Engine, EngineOptions
from .experts import Routing
from .lent_weights import LentWeights
from .names import HEAD
from .runnable import Runnable
from .tensors import F32_TYPE, Tensor, routing_of, rows_of, tensor_at

Sink = Callable[[str, NDArray[np.float32], Routing | None], None]
"""Receives the name of the weight, its input, float32 (rows, channels), valid during the call only, and for a
stack of experts, which of them multiply which rows."""

_HEAD_INPUT = "result_norm"
_WEIGHT_SUFFIX = b".weight"


class ObservedEngine(Engine):
    """An :class:`Engine` that shows the inputs of all linear layers to a sink.

    Every sequence has its own part of the KV cache (``options.n_ctx / options.n_sequences`` cells), so many
    short sequences cost no more attention than one. Weights that read the same tensor (q, k, v; gate, up)
    are reported once: :attr:`sharing` maps each weight to the one it is reported under.
    """

    def __init__(self, model: Runnable, options: EngineOptions, sink: Sink | None = None) -> None:
        self._lent = LentWeights(model.elsewhere, model.copies) if model.elsewhere else None
        self._only_lent = False
        if self._lent is not None:
            # rearranged while it is loaded, a weight would be what the file has: nothing
            options = replace(options, repack=False)
        self.sharing: dict[str, str] = {}
        self._sink = sink
        self._failure: BaseException | None = None
        self._wants_logits = False
        self._reported: dict[int, str] = {}
        self._callback: Any = None
        self._signals = DeferredSignals()
        super().__init__(model.path, options)

    def __enter__(self) -> ObservedEngine:
        return self

    def close(self) -> None:
        """See :meth:`Engine.close`; what was lent goes too."""
        super().close()
        self._callback = None  # a cycle: it holds this engine

    def _context_params(self) -> Any:
        params = super()._context_params()
        params.kv_unified = False
        if self._sink is not None or self._lent is not None:
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

    def _visit(self, address: int, ask: bool, _user_data: Any) -> bool:
        node = tensor_at(address)
        # An exception must not cross the C frames between here and the caller
        try:
            if self._signals.pending is None and self._failure is None:
                return self._before(node) if ask else self._after(node)
        except BaseException as failure:
            self._failure = failure
        if ask:
            self._give_up(node)
        return ask  # a node that was asked for and is not wanted after all ends the computation

    def _give_up(self, node: Tensor) -> None:
        """The computation ends, with this node as the last one."""

    def _before(self, node: Tensor) -> bool:
        has_guests = self._lent is not None and self._lent.before(node)
        wanted = self._wants(node)
        self._only_lent = has_guests and not wanted
        return has_guests or wanted

    def _after(self, node: Tensor) -> bool:
        if self._lent is not None:
            self._lent.after()
        return self._only_lent or self._look_at(node)

    def _wants(self, node: Tensor) -> bool:
        """Whether :meth:`_look_at` is to see a node."""
        if node.name == _HEAD_INPUT.encode():
            return True
        if not node.src[0] or not node.src[1]:
            return False
        weight, source = tensor_at(node.src[0]), tensor_at(node.src[1])
        if (
            not weight.name.endswith(_WEIGHT_SUFFIX)
            or source.type != F32_TYPE
            or weight.ne[0] != source.ne[0]
        ):
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

    def _look_at(self, node: Tensor) -> bool:
        """A node that was wanted, computed; whether to go on."""
        if node.name == _HEAD_INPUT.encode():
            if self._sink is not None:
                self.sharing[HEAD] = HEAD
                self._sink(HEAD, rows_of(node), None)
            # the head itself is seldom needed
            return self._wants_logits
        name = tensor_at(node.src[0]).name.decode()
        self.sharing.setdefault(name, name)
        if self._sink is not None:
            self._sink(name, rows_of(tensor_at(node.src[1])), routing_of(node))
        return True
