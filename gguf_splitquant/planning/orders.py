"""The order in which channel clusters read a layer's input, and how little of it a file has to hold.

Inside a cluster channels keep the input's order, so which cluster a channel is in says everything: half a
byte for each instead of an index. In a model of small matrices indices are a hundredth of its size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from gguf import GGMLQuantizationType
from numpy.typing import NDArray

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]

ORDER_TYPES = (GGMLQuantizationType.I8, GGMLQuantizationType.I32)
"""Of orders in files: clusters, and, in version 1 of the format, the channels themselves."""

MOST_CLUSTERS = 256
"""Of an order, where several weights cut one input."""

_BY_TWO = 16
"""Clusters that half a byte can tell apart."""


@dataclass(frozen=True)
class ChannelOrder:
    """The order in which channel clusters read an input, shared by all weights that read it.

    Attributes:
        name: of the tensor in the file.
        clusters: of each input channel, the number of its cluster: uint8 (channels,). Where several weights
            cut the input at different places, a cluster here lies between two cuts of any of them.
    """

    name: str
    clusters: U8

    @cached_property
    def channels(self) -> I64:
        """Input channel at each position, a permutation: one cluster after the other, ascending in each."""
        return np.argsort(self.clusters, kind="stable")

    @cached_property
    def stored(self) -> U8:
        """As the file has it, type I8: two channels in a byte, the first in its low half, or one."""
        if len(self.clusters) % 2 or self.clusters.max(initial=0) >= _BY_TWO:
            return self.clusters
        return self.clusters[::2] | self.clusters[1::2] << np.uint8(4)


def stored_bits(cuts: int) -> int:
    """Bits of a channel's place in an order whose input is cut at up to so many places."""
    return 4 if cuts < _BY_TWO else 8


def channels_of(stored: NDArray[np.generic], qtype: GGMLQuantizationType, channels: int) -> I64 | None:
    """The channels of an order that a file holds, at each position; None if it is no order of so many.

    Args:
        stored: the tensor's values, int32 of type I32 (the channels themselves), uint8 of type I8.
        qtype: its type.
        channels: of the input.
    """
    if qtype is GGMLQuantizationType.I32:
        found = stored.astype(np.int64)
        return found if np.array_equal(np.sort(found), np.arange(channels)) else None
    if qtype is not GGMLQuantizationType.I8 or len(stored) not in (channels, channels / 2):
        return None
    clusters = stored.view(np.uint8)
    if len(clusters) < channels:
        clusters = np.stack([clusters & np.uint8(15), clusters >> np.uint8(4)], axis=1).reshape(-1)
    return np.argsort(clusters, kind="stable")
