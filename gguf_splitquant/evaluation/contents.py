"""Size of a model file in the units that people compare: bytes, and bits per weight of the float model.

llama.cpp counts every sub-layer of a split file as parameters, so its bits per weight mislead. Here a weight
is one of the float model, however many sub-layers share it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import Keys

from ..gguf_io.header import GGUFHeader, TensorEntry, read_header
from ..gguf_io.metadata import KEY_LAYOUT, KEY_PARAMETER_COUNT
from ..gguf_io.sublayer_check import check_sublayers
from ..planning.orders import ORDER_TYPES

_EXTRA = re.compile(r"\.split[1-9][0-9]*(?=\.weight$|\.bias$)")

_NOT_LINEAR = ("norm", "ffn_gate_inp", "ssm_conv1d")
"""Norms with a shape, routers of mixtures of experts, convolutions: always float, so they would blur the
figure."""


def base_name(name: str) -> str:
    """The standard name of the weight that a sub-layer belongs to; other names are returned as they are."""
    return _EXTRA.sub("", name)


def is_order(tensor: TensorEntry) -> bool:
    """The tensor is a channel order: numbers of clusters or channels, not weights."""
    return tensor.name.endswith(".order") and tensor.qtype in ORDER_TYPES


def is_linear(tensor: TensorEntry) -> bool:
    """The tensor is (a sub-layer of) the weight of a linear layer, head included, embedding not."""
    name = base_name(tensor.name)
    if is_order(tensor):
        return True  # its bytes belong to the layers that read in this order
    return name == "output.weight" or (
        name.startswith("blk.")
        and name.endswith(".weight")
        and len(tensor.shape) >= 2
        and not any(part in name for part in _NOT_LINEAR)
    )


@dataclass(frozen=True)
class Contents:
    """What is in a file. Made by :func:`read_contents`."""

    header: GGUFHeader

    @property
    def path(self) -> Path:
        """The file."""
        return self.header.path

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return self.header.file_bytes

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Key-value pairs of the file."""
        return self.header.metadata

    def text(self, key: str) -> str | None:
        """The string under ``key``; None where there is none, or something else."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    @property
    def context_length(self) -> int:
        """Context that the model was trained with; 0 where the file does not say."""
        architecture = self.text(Keys.General.ARCHITECTURE) or ""
        value = self.metadata.get(Keys.LLM.CONTEXT_LENGTH.format(arch=architecture), 0)
        return value if isinstance(value, int) else 0

    @cached_property
    def layers(self) -> Mapping[str, Sequence[TensorEntry]]:
        """Weights by standard name, each with its sub-layers (one, if it is not split), in file order."""
        groups: dict[str, list[TensorEntry]] = {}
        for tensor in self.header.tensors:
            groups.setdefault(base_name(tensor.name), []).append(tensor)
        return groups

    def shape_of(self, group: Sequence[TensorEntry]) -> tuple[int, ...]:
        """Shape of the weight that sub-layers make up: clusters of channels side by side, or all alike."""
        first = group[0].shape
        if self.text(KEY_LAYOUT) != "split":
            return first
        return (*first[:-1], sum(t.shape[-1] for t in group))

    @cached_property
    def n_params(self) -> int:
        """Parameters of the float model: as recorded, else counted without sub-layers beyond the first."""
        recorded = self.metadata.get(KEY_PARAMETER_COUNT)
        if isinstance(recorded, int) and recorded > 0:
            return recorded
        weights = (group for group in self.layers.values() if not is_order(group[0]))
        return sum(math.prod(self.shape_of(group)) for group in weights)

    @cached_property
    def linear_bpw(self) -> float | None:
        """Bits per weight of the linear layers; None if there are none."""
        linear_bytes = sum(t.nbytes for t in self.header.tensors if is_linear(t))
        other = sum(group[0].n_params for group in self.layers.values() if not is_linear(group[0]))
        # with the recorded count, this also holds where sub-layers partition a weight
        linear_params = self.n_params - other
        return 8 * linear_bytes / linear_params if linear_bytes and linear_params > 0 else None

    @cached_property
    def file_bpw(self) -> float:
        """Bits of the whole file (metadata and vocabulary too) per weight."""
        return 8 * self.file_bytes / max(1, self.n_params)

    @cached_property
    def types(self) -> Mapping[str, int]:
        """Number of tensors of each ggml type, most frequent first."""
        counts: dict[str, int] = {}
        for tensor in self.header.tensors:
            counts[tensor.qtype.name] = counts.get(tensor.qtype.name, 0) + 1
        return dict(sorted(counts.items(), key=lambda pair: -pair[1]))


def read_contents(path: Path) -> Contents:
    """Read the header of a GGUF file.

    Raises:
        GGUFError: it is damaged (see :func:`~..gguf_io.header.read_header`), or its sub-layers do not fit
            together (:func:`~..gguf_io.sublayer_check.check_sublayers`).
    """
    header = read_header(path)
    check_sublayers(header)
    return Contents(header)
