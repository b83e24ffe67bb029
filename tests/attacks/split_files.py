"""Split files that lie about their sub-layers and the orders of their channels, each wrong in one thing.

Two readers get each: ours, which checks a file by its own word, and the patched llama.cpp, which checks it by
the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tests.runtime.channel_models import (
    TENSORS_KEY,
    WEIGHTS_KEY,
    ChannelModel,
    order_name,
    split_channels,
)
from tests.runtime.tiny_models import N_EMBD, llama, split, sublayer_name, write

DENSE, TIED, EXPERTS = llama(), llama(tied=True), llama(experts=True)
Q, K, V = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.attn_v.weight"
DOWN, UP = "blk.0.ffn_down.weight", "blk.0.ffn_up.weight"
SPLIT1, SPLIT2, SPLIT3 = (sublayer_name(Q, i) for i in (1, 2, 3))
ORDER = order_name(Q)

GOOD, _ = split_channels(DENSE, [Q, K])
IDS = GOOD.model.tensors[ORDER]


@dataclass(frozen=True)
class SplitAttack:
    """One bad file.

    Attributes:
        name: what is wrong with it.
        write: writes it.
        ours: a pattern in the error of our reader; empty: it cannot see this, and llama.cpp has to.
        theirs: a text in llama.cpp's log when it refuses the file; empty: it is harmless there, and runs.
    """

    name: str
    write: Callable[[Path], Path]
    ours: str
    theirs: str


def _file(name: str, parts: ChannelModel, ours: str, theirs: str) -> SplitAttack:
    return SplitAttack(name, parts.write, ours, theirs)


def _relisted(**orders: str) -> ChannelModel:
    return replace(GOOD, orders=GOOD.orders | orders)


def _keys(
    name: str, metadata: Mapping[str, list[str] | list[int] | str], ours: str, theirs: str
) -> SplitAttack:
    return SplitAttack(name, lambda path: write(GOOD.model, path, metadata=metadata), ours, theirs)


def _zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def _last_channel(value: int) -> ChannelModel:
    ids = IDS.copy()
    ids[-1] = value
    return GOOD.changed(**{ORDER: ids})


def _cycle() -> ChannelModel:
    """Query and key each read in the other's order."""
    parts, _ = split_channels(DENSE, [Q, K], shared=False)
    return replace(parts, orders={Q: order_name(K), K: order_name(Q)})


def _other_width() -> ChannelModel:
    """The FFN's output, of 128 channels, in the query's order of 64."""
    parts, _ = split_channels(DENSE, [Q, DOWN])
    return replace(parts.changed([order_name(DOWN)]), orders={Q: ORDER, DOWN: ORDER})


def _half_as_wide() -> ChannelModel:
    """The query's 64 clusters, one in a byte, would also be 128 in half a byte each."""
    return _other_width().changed(**{ORDER: np.zeros(N_EMBD, np.uint8)})


def _value(name: str, ours: str, theirs: str, remove: str = "", **add: np.ndarray) -> SplitAttack:
    """A value split of the query in three, with one tensor removed, and others added."""
    tensors = dict(split(DENSE, [Q], 3).tensors)
    tensors.pop(remove, None)
    model = replace(DENSE, tensors=tensors | add)
    return SplitAttack(f"value split: {name}", lambda path: write(model, path), ours, theirs)


_WIDTH1 = GOOD.model.tensors[SPLIT1].shape[1]
_FIT = f"tensor '{Q}': its parts have"

# fmt: off
ATTACKS = [
    # clusters
    _file("too narrow", GOOD.changed([SPLIT2]), "attn_q.order has the shape .64., and .* reads 28 channels",
          f"{_FIT} 28 columns, expected {N_EMBD}"),
    _file("too wide", GOOD.changed(**{SPLIT2: _zeros(N_EMBD, 60)}), "attn_q.order has the shape .64.", _FIT),
    _file("a gap", GOOD.changed([SPLIT1]), "attn_q.split1.weight is missing, of 2 or more",
          f"tensor '{Q}' has a channel order but is not split by channel"),
    _file("a later gap", GOOD.changed([SPLIT2], **{SPLIT3: GOOD.model.tensors[SPLIT2]}),
          "attn_q.split2.weight is missing", _FIT),
    _file("fewer rows", GOOD.changed(**{SPLIT1: _zeros(N_EMBD // 2, _WIDTH1)}),
          "attn_q.split1.weight has the shape .32, ", f"tensor '{SPLIT1}' has wrong shape"),
    _file("more dimensions", GOOD.changed(**{SPLIT1: _zeros(2, N_EMBD, _WIDTH1)}),
          "attn_q.split1.weight has the shape .2, 64, ", f"tensor '{SPLIT1}' has wrong shape"),
    _file("no columns", GOOD.changed([SPLIT1, SPLIT2], **{Q: _zeros(N_EMBD, 0), SPLIT1: DENSE.tensors[Q]}),
          "attn_q.weight has no channels", f"tensor '{Q}' has no columns"),
    _file("a cluster without columns", GOOD.changed(**{SPLIT1: _zeros(N_EMBD, 0)}),
          "attn_q.split1.weight has no channels", f"tensor '{SPLIT1}' has no columns"),
    _file("a sub-layer of a sub-layer", GOOD.changed(**{"blk.0.attn_q.split1.split1.weight": _zeros(64, 4)}),
          "split1.split1.weight is a sub-layer of a", "wrong number of tensors"),
    # orders
    _file("no order", GOOD.changed([ORDER]), "attn_q.order is missing, the channel order of",
          f"tensor '{ORDER}' not found"),
    _file("an order of floats", GOOD.changed(**{ORDER: IDS.astype(np.float32)}),
          "attn_q.order is F32: a channel order is I8 or",
          f"tensor '{ORDER}' has type f32, expected i8 or i32"),
    _file("an order too short", GOOD.changed(**{ORDER: IDS[:-1]}), "attn_q.order has the shape .63.",
          f"tensor '{ORDER}' has wrong shape"),
    _file("an order too long", GOOD.changed(**{ORDER: np.arange(65, dtype=np.int32)}),
          "attn_q.order has the shape .65.", f"tensor '{ORDER}' has wrong shape"),
    _file("an order with two dimensions", GOOD.changed(**{ORDER: IDS.reshape(8, 8)}),
          "attn_q.order has the shape .8, 8.", f"tensor '{ORDER}' has wrong shape"),
    *(_file(f"{length} bytes of clusters", GOOD.changed(**{ORDER: np.zeros(length, np.uint8)}),
            f"attn_q.order has the shape .{length}.", f"tensor '{ORDER}' has wrong shape")
      for length in (31, 33, 63, 65)),
    _file("an order that is not there", _relisted(**{K: order_name(K)}), "attn_k.order is missing",
          f"'{order_name(K)}' not found"),
    _file("a weight as an order", _relisted(**{K: "blk.0.attn_norm.weight"}),
          "attn_norm.weight cannot be the channel order of blk.0.attn_k.weight",
          f"tensor '{K}' cannot have the channel order 'blk.0.attn_norm.weight'"),
    _file("the weight itself as its order", _relisted(**{K: K}), "attn_k.weight cannot be the channel order",
          f"tensor '{K}' cannot have the channel order"),
    _file("orders of each other", _cycle(), "cannot be the channel order of", "wrong number of tensors"),
    _file("an order of another width", _other_width(), "attn_q.order is the channel order of .*another num",
          f"tensor '{DOWN}' cannot have the channel order '{ORDER}'"),
    _file("an order of half the width", _half_as_wide(), "attn_q.order is the channel order of .*another num",
          f"tensor '{DOWN}' cannot have the channel order '{ORDER}'"),
    _file("an order for no weight", _relisted(**{"blk.9.attn_q.weight": ORDER}),
          "blk.9.attn_q.weight has a channel order, but is missing", "'blk.9.attn_q.weight' not found"),
    _file("an order for a whole weight", _relisted(**{UP: ORDER}), "ffn_up.weight has a channel order, but",
          f"tensor '{UP}' has a channel order but is not split by channel"),
    _file("an order for a sub-layer", _relisted(**{SPLIT1: ORDER}), "split1.weight has a channel order", ""),
    _file("an order that no weight reads", replace(GOOD, orders={}), "attn_q.order is a channel order that",
          "wrong number of tensors"),
    *(_file(f"channel {value} in an order", _last_channel(value), "order is not a permutation of 0 to 63",
            f"tensor '{ORDER}' is not a permutation of 0 to 63")
      for value in (-1, -(2**31), N_EMBD, 2**31 - 1, int(IDS[5]))),
    # the lists
    _keys("one order for two weights", {WEIGHTS_KEY: [Q, K], TENSORS_KEY: [ORDER]}, "names 2 weights, for 1",
          "the channel orders of 1 tensors are given for 2"),
    _keys("a weight twice", {WEIGHTS_KEY: [Q, Q], TENSORS_KEY: [ORDER, ORDER]}, "names a weight twice",
          f"tensor '{Q}' has two channel orders"),
    _keys("no list of orders", {WEIGHTS_KEY: [Q]}, "are not two lists",
          f"array key not found in model: {TENSORS_KEY}"),
    _keys("no list of weights", {TENSORS_KEY: [ORDER]}, "are not two lists",
          f"array key not found in model: {WEIGHTS_KEY}"),
    _keys("numbers of weights", {WEIGHTS_KEY: [0, 1], TENSORS_KEY: [ORDER, ORDER]}, "are not two lists",
          f"{WEIGHTS_KEY} has wrong array element type"),
    _keys("numbers of orders", {WEIGHTS_KEY: [Q, K], TENSORS_KEY: [0, 1]}, "are not two lists",
          f"{TENSORS_KEY} has wrong array element type"),
    _keys("names instead of lists", {WEIGHTS_KEY: Q, TENSORS_KEY: ORDER}, "are not two lists",
          f"array key not found in model: {WEIGHTS_KEY}"),
    _keys("a stock file", {WEIGHTS_KEY: list(GOOD.orders), TENSORS_KEY: list(GOOD.orders.values()),
                           "splitquant.layout": "stock"}, "in a file whose layout is 'stock'", ""),
    # weights that are no layers
    _file("an embedding", split_channels(DENSE, ["token_embd.weight"])[0], "token_embd.weight is split",
          "token_embd.weight"),
    _file("a tied embedding", split_channels(TIED, ["token_embd.weight"])[0], "token_embd.weight is split",
          "token_embd.weight"),
    _file("a tied embedding, identity", split_channels(TIED, ["token_embd.weight"], ordered=False)[0],
          "token_embd.weight is split by channel", "tensor 'token_embd.weight' has wrong shape"),
    _file("a norm", split_channels(DENSE, ["blk.0.attn_norm.weight"], ordered=False)[0],
          "attn_norm.weight is split by channel", "tensor 'blk.0.attn_norm.weight' has wrong shape"),
    # value splits
    _value("a gap", "attn_q.split1.weight is missing", "wrong number of tensors", remove=SPLIT1),
    _value("another shape", "split1.weight has the shape .32, 64.", f"tensor '{SPLIT1}' has wrong shape",
           **{SPLIT1: _zeros(N_EMBD // 2, N_EMBD)}),
    _value("more dimensions", "split1.weight has the shape .64, 64, 2.",
           f"tensor '{SPLIT1}' has wrong shape", **{SPLIT1: _zeros(N_EMBD, N_EMBD, 2)}),
    _value("no sub-layer 0", "is a sub-layer of blk.0.attn_q.weight, which is missing", f"'{Q}' not found",
           remove=Q),
    _value("a weight that is not there", "attn_qkv.weight, which is missing", "wrong number of tensors",
           **{"blk.0.attn_qkv.split1.weight": _zeros(N_EMBD * 2, N_EMBD)}),
    _value("another spelling", "attn_q.split01.weight is no name", "wrong number of tensors",
           **{"blk.0.attn_q.split01.weight": _zeros(N_EMBD, N_EMBD)}),
    _value("number 0", "attn_q.split0.weight is no name", "wrong number of tensors",
           **{"blk.0.attn_q.split0.weight": _zeros(N_EMBD, N_EMBD)}),
    _value("a number of thirty digits", "is no name of a sub-layer", "wrong number of tensors",
           **{f"blk.0.attn_q.split{'9' * 30}.weight": _zeros(N_EMBD, N_EMBD)}),
    _value("a bias", "attn_q.split1.bias is no name", "wrong number of tensors",
           **{"blk.0.attn_q.split1.bias": _zeros(N_EMBD)}),
]
# fmt: on
