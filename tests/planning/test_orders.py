"""Orders of channels, and what a file holds of them."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.planning.orders import ChannelOrder, channels_of, stored_bits


@given(
    clusters=st.integers(1, 256).flatmap(
        lambda count: st.lists(st.integers(0, count - 1), min_size=1, max_size=200)
    )
)
def test_what_a_file_holds_gives_the_order_again(clusters: list[int]) -> None:
    order = ChannelOrder("x.order", np.array(clusters, np.uint8))
    found = channels_of(order.stored, Q.I8, len(clusters))
    assert found is not None and found.tolist() == order.channels.tolist()
    # one cluster after the other, and ascending in each
    assert order.channels.tolist() == sorted(range(len(clusters)), key=lambda i: (clusters[i], i))


@pytest.mark.parametrize(("most", "nbytes"), [(0, 32), (15, 32), (16, 64), (255, 64)])
def test_half_a_byte_for_each_channel_while_sixteen_clusters_are_enough(most: int, nbytes: int) -> None:
    clusters = np.arange(64, dtype=np.uint8) % (most + 1) if most < 64 else np.full(64, most, np.uint8)
    stored = ChannelOrder("x.order", clusters).stored
    assert (stored.dtype, stored.shape) == (np.uint8, (nbytes,))
    assert 8 * nbytes <= 64 * stored_bits(most)  # cuts: one less than clusters


def test_two_channels_lie_in_a_byte_low_half_first() -> None:
    order = ChannelOrder("x.order", np.array([2, 0, 1, 15], np.uint8))
    assert order.stored.tolist() == [0x02, 0xF1]
    assert order.channels.tolist() == [1, 2, 0, 3]


@pytest.mark.parametrize("length", [0, 15, 17, 31, 33, 64])
def test_another_number_of_bytes_is_no_order(length: int) -> None:
    assert channels_of(np.zeros(length, np.int8), Q.I8, 32) is None


def test_orders_of_version_1_are_the_channels_themselves() -> None:
    channels = np.array([3, 0, 2, 1], np.int32)
    found = channels_of(channels, Q.I32, 4)
    assert found is not None and found.tolist() == [3, 0, 2, 1]
    for wrong in ([3, 0, 2, 2], [4, 0, 2, 1], [-1, 0, 2, 1], [0, 1, 2], [0, 1, 2, 3, 4]):
        assert channels_of(np.array(wrong, np.int32), Q.I32, 4) is None
    assert channels_of(np.zeros(4, np.float32), Q.F32, 4) is None
