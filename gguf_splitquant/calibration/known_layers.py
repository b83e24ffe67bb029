"""Errors in a layer change nothing before it: there, what is known already is put in instead of computed.

llama.cpp always runs its whole graph. A node whose operation is none takes no time, though, and the
evaluation callback sees every node before it is computed (:mod:`.observer`). So the nodes that lead to the
output of a layer lose their operation, and the output gets its values from an earlier run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from .tensors import NO_OPERATION, Tensor, address_of, rows_of, tensor_at

F32 = NDArray[np.float32]
I64 = NDArray[np.int64]

_OUTPUT = re.compile(rb"l_out-(\d+)")
"""What llama.cpp calls the output of a layer, in most architectures."""


@dataclass(frozen=True)
class _Node:
    """What a graph's order of computation says about one node.

    Attributes:
        name: of the node.
        address: of its tensor.
        shares: the tensor whose memory it is a view of; 0 if it has its own.
        reads: tensors that it is computed from, and those whose memory these are views of.
    """

    name: bytes
    address: int
    shares: int
    reads: frozenset[int]

    @classmethod
    def of(cls, tensor: Tensor) -> _Node:
        sources = [s for s in tensor.src if s]
        shared = [tensor_at(s).view_src for s in sources]
        reads = frozenset([*sources, *(s for s in shared if s)])
        return cls(tensor.name, address_of(tensor), tensor.view_src or 0, reads)


class OtherGraph(EngineError):
    """The graph is not the one that was recorded."""


class KnownLayers:
    """Outputs of layers from one run, for others with the same tokens: first all nodes are shown to
    :meth:`record`, later to :meth:`leave_out`.

    Args:
        layers: whose outputs are kept.
        sequences: in the run that is recorded.
        length: tokens of each.
    """

    def __init__(self, layers: Collection[int], sequences: int, length: int) -> None:
        self._layers = layers
        self._shape = sequences, length
        self._nodes: list[_Node] = []
        self._outputs: dict[int, tuple[int, F32]] = {}
        self._left: list[tuple[Tensor, int]] = []
        self._skipped: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._values: F32 | None = None
        self._position = 0

    def record(self, node: Tensor) -> bool:
        """Take down a node before it is computed; True if :meth:`keep` is to follow."""
        self._nodes.append(_Node.of(node))
        return _layer(node) in self._layers

    def keep(self, node: Tensor) -> None:
        """Take down an output, computed; if it is one of all tokens, which the last layer's is not."""
        layer, values = _layer(node), rows_of(node)
        if layer is not None and len(values) == self._shape[0] * self._shape[1]:
            self._outputs[layer] = len(self._nodes) - 1, values.reshape(*self._shape, -1).copy()

    def begin(self, layer: int, sequences: I64) -> None:
        """From now on leave out what leads to the output of ``layer``, where it is known.

        ``sequences``: those of the recorded run that come now.
        """
        last, values = self._outputs.get(layer, (-1, None))
        self._skipped = self._not_needed(last)
        self._values = None if values is None else values[sequences].reshape(-1, values.shape[-1])
        self._position = 0

    def end(self) -> None:
        """Give the nodes their operations back: the graph may serve again."""
        for node, operation in reversed(self._left):
            node.op = operation
        self._left.clear()
        self._skipped, self._values = self._skipped[:0], None

    def leave_out(self, node: Tensor) -> bool:
        """Whether the node, which is next, is left out.

        Raises:
            OtherGraph: it is not the node that was there in the recorded run.
        """
        if self._position >= len(self._skipped):
            return False
        position, self._position = self._position, self._position + 1
        if node.name != self._nodes[position].name:
            raise OtherGraph(node.name.decode("utf-8", "replace"), "the graph is another one than before")
        if self._skipped[position]:
            self._stop(node)
        return bool(self._skipped[position])

    def give_up(self, node: Tensor) -> None:
        """The run ends with this node: it must not be computed from what was left out."""
        if self._left:
            self._stop(node)

    def _stop(self, node: Tensor) -> None:
        self._left.append((node, node.op))
        node.op = NO_OPERATION

    @property
    def at_output(self) -> bool:
        """The last node that was left out is the output: :meth:`put_in` is to follow."""
        return self._values is not None and self._position == len(self._skipped)

    def put_in(self, node: Tensor) -> None:
        """Give the output its values."""
        assert self._values is not None
        rows_of(node)[:] = self._values
        self._values = None

    def _not_needed(self, last: int) -> NDArray[np.bool_]:
        """Which nodes, up to that number, serve nothing after it but the last one: bool (last + 1,)."""
        skipped = np.ones(last + 1, np.bool_)
        needed: set[int] = set()
        for node in self._nodes[last + 1 :]:
            needed |= node.reads
        for position in range(last - 1, -1, -1):
            node = self._nodes[position]
            # what it writes may be read through other views of the same memory
            if node.address in needed or node.shares in needed:
                skipped[position] = False
                needed |= node.reads
        return skipped


def _layer(node: Tensor) -> int | None:
    """The layer whose output a node is."""
    match = _OUTPUT.fullmatch(node.name)
    return int(match[1]) if match else None
