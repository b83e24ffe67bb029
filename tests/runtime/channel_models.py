"""Tiny models whose weights are split by input channel, written with gguf-py alone.

The reference for the runtime's arithmetic: nothing here uses the package's own writer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

from tests.runtime.tiny_models import TinyModel, quantize, sublayer_name, write

WEIGHTS_KEY = "splitquant.order.weights"
TENSORS_KEY = "splitquant.order.tensors"

_INPUTS = {
    "attn_q": "attention",
    "attn_k": "attention",
    "attn_v": "attention",
    "ffn_gate_inp": "ffn",
    "ffn_gate": "ffn",
    "ffn_up": "ffn",
    "ffn_gate_exps": "ffn",
    "ffn_up_exps": "ffn",
}


@dataclass(frozen=True)
class ChannelModel:
    """``model`` has the clusters and the order tensors; ``orders`` maps a weight to its order tensor;
    ``types`` are the clusters' types where they are not F32."""

    model: TinyModel
    orders: dict[str, str] = field(default_factory=dict)
    types: dict[str, GGMLQuantizationType] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        metadata: dict[str, list[str] | list[int] | str] = {}
        if self.orders:
            metadata = {WEIGHTS_KEY: list(self.orders), TENSORS_KEY: list(self.orders.values())}
        return write(self.model, path, self.types, metadata)

    def changed(self, remove: Sequence[str] = (), /, **tensors: np.ndarray) -> ChannelModel:
        """The same with tensors taken away, and others added or replaced."""
        kept = {name: values for name, values in self.model.tensors.items() if name not in remove}
        return replace(self, model=replace(self.model, tensors=kept | tensors))


def order_name(name: str) -> str:
    """``blk.0.attn_q.weight`` -> ``blk.0.attn_q.order``."""
    return f"{name.removesuffix('.weight')}.order"


def _input_of(name: str) -> str:
    """Weights with the same answer read the same input."""
    match = re.fullmatch(r"(blk\.\d+)\.(\w+)\.weight", name)
    return f"{match[1]}.{_INPUTS.get(match[2], match[2])}" if match else name


def widths(n_in: int, k: int = 3, block: int = 1) -> list[int]:
    """``k`` unequal widths, multiples of ``block``, that add up to ``n_in``; fewer where it has no room."""
    n_blocks = n_in // block
    edges = sorted({0, n_blocks, *(min(n_blocks, max(i, n_blocks * i * i // (k * k))) for i in range(1, k))})
    return [(high - low) * block for low, high in pairwise(edges)]


def split_channels(
    model: TinyModel,
    names: Sequence[str],
    *,
    k: int = 3,
    kinds: Sequence[GGMLQuantizationType] = (),
    ordered: bool = True,
    shared: bool = True,
    stored: str = "channels",
) -> tuple[ChannelModel, TinyModel]:
    """The named weights in ``k`` clusters of channels, of the types ``kinds`` in turn.

    Without ``ordered`` the clusters are consecutive channels and there are no order tensors; ``shared`` gives
    weights that read one input one order. An order tensor has ``stored``: the "channels", in any order, or
    the cluster of each, "one in a byte" or "two in a byte". Also returns the whole F32 model with the
    clusters' decoded values.
    """
    rng = np.random.default_rng(11)
    block = 32 if kinds else 1
    tensors: dict[str, np.ndarray] = {}
    whole = dict(model.tensors)
    result = ChannelModel(model)
    owners: dict[str, str] = {}
    orders: dict[str, np.ndarray] = {}
    for name, weight in model.tensors.items():
        if name not in names:
            tensors[name] = weight
            continue
        n_in = weight.shape[-1]
        order = np.arange(n_in, dtype=np.int32)
        if ordered:
            owner = owners.setdefault(_input_of(name) if shared else name, name)
            result.orders[name] = order_name(owner)
            if owner == name:
                orders[name] = rng.permutation(n_in).astype(np.int32)
                tensors[order_name(name)] = orders[name]
                if stored != "channels":
                    parts = widths(n_in, k, block)
                    clusters = rng.permutation(np.repeat(np.arange(len(parts)), parts)).astype(np.uint8)
                    orders[name] = np.argsort(clusters, kind="stable").astype(np.int32)
                    two = stored == "two in a byte"
                    tensors[order_name(name)] = clusters[::2] + 16 * clusters[1::2] if two else clusters
            order = orders[owner]
        whole[name] = np.empty_like(weight)
        start = 0
        for i, width in enumerate(widths(n_in, k, block)):
            channels = order[start : start + width]
            part = np.ascontiguousarray(weight[..., channels])
            tensors[sublayer_name(name, i)] = part
            whole[name][..., channels] = part
            if kinds:
                kind = kinds[i % len(kinds)]
                result.types[sublayer_name(name, i)] = kind
                whole[name][..., channels] = quants.dequantize(quantize(part, kind), kind).reshape(part.shape)
            start += width
    return replace(result, model=replace(model, tensors=tensors)), replace(model, tensors=whole)
