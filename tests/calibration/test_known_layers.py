"""What is left out of a graph changes nothing of what is computed."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.calibration.known_layers import KnownLayers
from gguf_splitquant.calibration.names import HEAD
from gguf_splitquant.calibration.runnable import Runnable
from gguf_splitquant.calibration.tensors import Tensor, address_of
from gguf_splitquant.errors import EngineError
from tests.calibration.probing import disturbed_logits
from tests.gguf_files import FLOAT, convert_once

TEXT = np.arange(3, 75, dtype=np.int32).reshape(3, 24)
ADD, VIEW, SET_ROWS = 2, 37, 42


def node(name: str, *sources: Tensor, op: int = ADD, of: Tensor | None = None, rows: int = 0) -> Tensor:
    """A node of a graph; ``of``: what it is a view of; ``rows``: of two values each that it has room for."""
    tensor = Tensor(op=op, name=name.encode())
    for i, source in enumerate(sources):
        tensor.src[i] = address_of(source)
    if of is not None:
        tensor.view_src = of.view_src or address_of(of)
    tensor.ne[:] = (2, rows, 1, 1)
    tensor.nb[:] = (4, 8, 8 * rows, 8 * rows)
    if rows:
        tensor.room = (ctypes.c_float * (2 * rows))()
        tensor.data = ctypes.addressof(tensor.room)
    return tensor


def graph() -> list[Tensor]:
    """Two layers that share a mask, and of which the second one reads the cache of the first."""
    embedding, positions, cache, own = node("embd"), node("pos"), node("cache"), node("cache 2")
    mask = node("mask", positions)
    write = node("write", embedding, cache, op=SET_ROWS, of=cache)
    read = node("read", cache, op=VIEW, of=cache)
    first = node("attention", read, mask)
    own_write = node("own write", embedding, own, op=SET_ROWS, of=own)
    own_read = node("own read", own, op=VIEW, of=own)
    second = node("second", own_read, first)
    output = node("l_out-0", second, embedding, rows=4)
    again = node("read again", cache, op=VIEW, of=cache)
    last = node("last", output, again, mask)
    leaves = [embedding, positions, cache, own]
    nodes = [mask, write, read, first, own_write, own_read, second, output, again, last]
    last.leaves = leaves  # they live as long as the graph
    return nodes


def recorded(nodes: Sequence[Tensor], layers: Sequence[int] = (0,)) -> KnownLayers:
    known = KnownLayers(layers, sequences=2, length=2)
    for tensor in nodes:
        if known.record(tensor):
            known.keep(tensor)
    return known


def run(known: KnownLayers, nodes: Sequence[Tensor]) -> list[str]:
    """The nodes that are computed, in a second run."""
    computed = []
    for tensor in nodes:
        if not known.leave_out(tensor):
            computed.append(tensor.name.decode())
        elif known.at_output:
            assert tensor.name == b"l_out-0"
            known.put_in(tensor)
        else:
            assert tensor.op == 0
    return computed


def test_what_later_layers_read_is_computed() -> None:
    nodes = graph()
    known = recorded(nodes)
    known.begin(0, np.array([1, 0]))
    # the mask, what is written where the second layer reads, and a view of it, which costs nothing
    assert run(known, nodes) == ["mask", "write", "read", "read again", "last"]


def test_an_output_gets_the_values_of_its_sequences_and_nodes_their_operations_back() -> None:
    nodes = graph()
    output = nodes[7]
    output.room[:] = range(8)
    known = recorded(nodes)
    output.room[:] = [0.0] * 8
    before = [tensor.op for tensor in nodes]
    known.begin(0, np.array([1, 0]))
    run(known, nodes)
    assert list(output.room) == [4, 5, 6, 7, 0, 1, 2, 3]
    known.end()
    assert [tensor.op for tensor in nodes] == before
    assert len(run(known, nodes)) == len(nodes)  # nothing is left out any more


@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_nothing_is_left_out_before_an_output_that_is_not_known(layer: int) -> None:
    nodes = graph()
    known = recorded(nodes)
    known.begin(layer, np.array([0, 1]))
    assert len(run(known, nodes)) == len(nodes)


def test_an_output_of_some_tokens_is_not_known() -> None:
    nodes = graph()
    nodes[7].ne[1] = 3
    known = recorded(nodes)
    known.begin(0, np.array([0, 1]))
    assert len(run(known, nodes)) == len(nodes)


def test_another_graph_is_refused() -> None:
    nodes = graph()
    known = recorded(nodes)
    known.begin(0, np.array([0, 1]))
    other = graph()
    other[5].name = b"another"
    with pytest.raises(EngineError, match="another: the graph is another one"):
        run(known, other)
    assert other[3].op == 0
    known.give_up(other[5])
    assert other[5].op == 0  # it would be computed from what was not
    known.end()
    assert [tensor.op for tensor in other] == [tensor.op for tensor in nodes]


def test_a_run_that_ends_before_anything_is_left_out_computes_its_last_node() -> None:
    nodes = graph()
    known = recorded(nodes)
    known.begin(0, np.array([0, 1]))
    known.give_up(nodes[0])
    assert nodes[0].op == ADD


@pytest.mark.engine
def test_where_the_graph_is_another_one_all_of_it_is_computed(
    stories15m: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Runnable(convert_once(stories15m, tmp_path, FLOAT, "float"))
    expected, _ = disturbed_logits(model, TEXT, ["blk.3.attn_v.weight"], layers=())
    record = KnownLayers.record

    def misremember(known: KnownLayers, tensor: Tensor) -> bool:
        if len(known._nodes) == 40:
            tensor = Tensor.from_buffer_copy(tensor)
            tensor.name = b"another"
        return record(known, tensor)

    monkeypatch.setattr(KnownLayers, "record", misremember)
    found, left_out = disturbed_logits(model, TEXT, ["blk.3.attn_v.weight"], layers=(3,))
    assert 10 < left_out < 50
    np.testing.assert_array_equal(found, expected)


@pytest.mark.engine
def test_errors_do_the_same_to_a_model_whose_first_layers_are_known(stories15m: Path, tmp_path: Path) -> None:
    model = Runnable(convert_once(stories15m, tmp_path, FLOAT, "float"))
    targets = [f"blk.{i}.{kind}.weight" for i in (0, 2, 5) for kind in ("attn_v", "ffn_down")]
    every, nothing_left_out = disturbed_logits(model, TEXT, [*targets, HEAD], layers=())
    known, left_out = disturbed_logits(model, TEXT, [*targets, HEAD], layers=(0, 2, 5))
    assert nothing_left_out == 0
    assert left_out > 200
    np.testing.assert_array_equal(known, every)
    # an error in another place would be seen
    assert len({logits.tobytes() for logits in known}) == len(known)
