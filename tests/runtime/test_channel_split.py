"""The patched llama.cpp with weights that are split by channel: its sums, and the files it must refuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter

from gguf_splitquant.planning.orders import channels_of
from tests.runtime.channel_models import (
    TENSORS_KEY,
    WEIGHTS_KEY,
    order_name,
    split_channels,
)
from tests.runtime.logits_process import LogitsProcess
from tests.runtime.tiny_models import N_EMBD, TinyModel, is_linear, llama, plm, split, sublayer_name, write

pytestmark = pytest.mark.engine

DENSE, TIED, EXPERTS = llama(), llama(tied=True), llama(experts=True)
Q, K, HEAD = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "output.weight"


def linear(model: TinyModel) -> list[str]:
    return [name for name in model.tensors if is_linear(name)]


# -- the sum -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["shared", "unshared", "identity", "one in a byte", "two in a byte"])
@pytest.mark.parametrize(
    ("model", "names", "k"),
    [
        pytest.param(DENSE, linear(DENSE), 3, id="linear layers"),
        pytest.param(TIED, linear(TIED), 8, id="tied, in eight"),
        pytest.param(DENSE, [HEAD], 2, id="head"),
        pytest.param(EXPERTS, linear(EXPERTS), 3, id="experts and their router"),
        pytest.param(EXPERTS, [*linear(EXPERTS), HEAD], 2, id="everything"),
        pytest.param(plm(), ["blk.0.ffn_up.weight"], 3, id="plm, where it sums"),
    ],
)
def test_float_split_equals_the_whole(
    model: TinyModel, names: list[str], k: int, order: str, patched: LogitsProcess, tmp_path: Path
) -> None:
    """Prompt and single tokens; both batch sizes go different ways through the graph."""
    expected = patched.run(write(model, tmp_path / "whole.gguf"))
    stored = order if "byte" in order else "channels"
    parts, _ = split_channels(
        model, names, k=k, ordered=order != "identity", shared=order != "unshared", stored=stored
    )
    path = parts.write(tmp_path / "split.gguf")
    actual = patched.run(path)
    assert actual.refused == "", actual.log
    assert np.abs(expected.logits).max() > 1
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)
    # neither the clusters nor their orders are more parameters
    assert actual.n_parameters == expected.n_parameters

    read = patched.run(path, mmap=False)
    np.testing.assert_array_equal(read.logits, actual.logits)
    assert patched.run(path, allocate=False).refused == ""


@pytest.mark.parametrize("name", ["blk.1.attn_v.weight", "blk.1.attn_output.weight", "blk.0.ffn_up.weight"])
def test_each_order_and_each_cluster_counts(name: str, patched: LogitsProcess, tmp_path: Path) -> None:
    """The comparison above would see a wrong channel, and a cluster that is left out."""
    parts, _ = split_channels(DENSE, linear(DENSE), shared=False)
    whole = patched.run(parts.write(tmp_path / "whole.gguf"))
    turned = parts.model.tensors[order_name(name)][::-1].copy()
    other = patched.run(parts.changed(**{order_name(name): turned}).write(tmp_path / "turned.gguf"))
    assert np.abs(other.logits - whole.logits).max() > 1e-2
    for i in range(3):
        zeros = np.zeros_like(parts.model.tensors[sublayer_name(name, i)])
        less = patched.run(parts.changed(**{sublayer_name(name, i): zeros}).write(tmp_path / "less.gguf"))
        assert np.abs(less.logits - whole.logits).max() > 1e-2


def test_value_and_channel_split_in_one_file(patched: LogitsProcess, tmp_path: Path) -> None:
    by_value = [name for name in linear(DENSE) if "attn" in name] + ["token_embd.weight"]
    by_channel = [name for name in linear(DENSE) if "ffn" in name]
    parts, _ = split_channels(split(DENSE, by_value), by_channel)
    actual = patched.run(parts.write(tmp_path / "split.gguf"))
    expected = patched.run(write(DENSE, tmp_path / "whole.gguf"))
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)
    assert actual.n_parameters == expected.n_parameters


def test_order_may_carry_the_name_of_any_weight_that_uses_it(patched: LogitsProcess, tmp_path: Path) -> None:
    """llama.cpp creates the query weight first, so its order is then not there yet."""
    value = "blk.0.attn_v.weight"
    parts, _ = split_channels(DENSE, [Q, K, value])
    expected = patched.run(parts.write(tmp_path / "query.gguf"))
    ids = parts.model.tensors[order_name(Q)]
    renamed = parts.changed([order_name(Q)], **{order_name(value): ids})
    renamed = replace(renamed, orders=dict.fromkeys([value, K, Q], order_name(value)))
    actual = patched.run(renamed.write(tmp_path / "value.gguf"))
    assert actual.refused == "", actual.log
    np.testing.assert_array_equal(actual.logits, expected.logits)


@pytest.mark.parametrize("by_two", [False, True])
def test_whatever_the_clusters_are_they_give_an_order(
    by_two: bool, patched: LogitsProcess, tmp_path: Path
) -> None:
    """Bytes from 0 to 255, which have nothing to do with the widths of the parts."""
    stored = np.random.default_rng(3).integers(0, 256, N_EMBD // 2 if by_two else N_EMBD).astype(np.uint8)
    channels = channels_of(stored, Type.I8, N_EMBD)
    assert channels is not None
    parts, _ = split_channels(DENSE, [Q])
    as_channels = parts.changed(**{order_name(Q): channels.astype(np.int32)}).write(tmp_path / "i32.gguf")
    as_clusters = parts.changed(**{order_name(Q): stored}).write(tmp_path / "i8.gguf")
    expected, actual = (patched.run(path) for path in (as_channels, as_clusters))
    assert actual.refused == expected.refused == ""
    np.testing.assert_array_equal(actual.logits, expected.logits)


def test_thirty_layers_in_eight(patched: LogitsProcess, tmp_path: Path) -> None:
    """The graph has room for its extra nodes, also in the pass that only measures memory."""
    model = llama(n_layer=30)
    expected = patched.run(write(model, tmp_path / "whole.gguf"))
    parts, _ = split_channels(model, [*linear(model), HEAD], k=8, shared=False)
    path = parts.write(tmp_path / "split.gguf")
    np.testing.assert_allclose(patched.run(path).logits, expected.logits, atol=1e-4)
    assert patched.run(path, allocate=False).refused == ""


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize(
    "kinds",
    [
        (Type.Q8_0, Type.Q8_0),
        (Type.Q4_0, Type.Q4_0),
        (Type.IQ4_NL, Type.IQ4_NL),
        (Type.Q8_0, Type.Q5_0, Type.Q4_0),
        (Type.Q5_1, Type.Q4_1, Type.IQ4_NL),
    ],
    ids=lambda kinds: "+".join(kind.name for kind in kinds),
)
@pytest.mark.parametrize("model", [TIED, EXPERTS], ids=["tied", "experts"])
def test_every_cluster_has_its_own_type(
    model: TinyModel, kinds: tuple[Type, ...], repack: bool, patched: LogitsProcess, tmp_path: Path
) -> None:
    """Against a whole F32 file of the decoded values. What is left is the kernels' rounding of activations
    to 8 bit; repacked weights (Q4_0, IQ4_NL) read them with kernels of their own."""
    names = [name for name in linear(model) if "gate_inp" not in name]
    parts, whole = split_channels(model, names, kinds=kinds)
    expected = patched.run(write(whole, tmp_path / "whole.gguf"))
    actual = patched.run(parts.write(tmp_path / "split.gguf"), repack=repack)
    assert actual.refused == "", actual.log
    errors = np.linalg.norm(actual.logits - expected.logits, axis=1) / np.linalg.norm(expected.logits, axis=1)
    # where two experts are all but equally good, rounding may choose the other one at a position
    assert np.median(errors) < 0.02


@pytest.mark.parametrize("kinds", [(Type.Q8_0, Type.Q5_0, Type.IQ4_NL), (Type.F32, Type.F16, Type.BF16)])
def test_threads_share_the_rows_of_a_token(
    kinds: tuple[Type, ...], patched: LogitsProcess, tmp_path: Path
) -> None:
    """Parts that are multiplied at once, and one that is repacked: more threads than some weights' rows."""
    parts, _ = split_channels(DENSE, linear(DENSE), kinds=kinds)
    path = parts.write(tmp_path / "split.gguf")
    one, several = patched.run(path), patched.run(path, threads=3)
    assert one.refused == "" and np.abs(one.logits).max() > 1
    np.testing.assert_array_equal(several.logits, one.logits)


@pytest.mark.parametrize("stored", ["channels", "two in a byte"])
def test_saved_model_keeps_clusters_and_orders(stored: str, patched: LogitsProcess, tmp_path: Path) -> None:
    parts, _ = split_channels(DENSE, [*linear(DENSE), HEAD], stored=stored)
    path = parts.write(tmp_path / "split.gguf")
    saved = tmp_path / "saved.gguf"
    expected = patched.run(path, mmap=False, repack=False, save=saved)
    before, after = (GGUFReader(file) for file in (path, saved))
    assert _tensors(after) == _tensors(before)
    assert _orders(after) == _orders(before) == parts.orders
    np.testing.assert_array_equal(patched.run(saved, repack=False).logits, expected.logits)


def _tensors(reader: GGUFReader) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


def _orders(reader: GGUFReader) -> dict[str, str]:
    weights, tensors = (reader.fields[key].contents() for key in (WEIGHTS_KEY, TENSORS_KEY))
    return dict(zip(weights, tensors, strict=True))


def test_adapters_apply_to_split_models(patched: LogitsProcess, tmp_path: Path) -> None:
    """An adapter reads the layer's input in its own order."""
    rng = np.random.default_rng(5)
    adapter = tmp_path / "adapter.gguf"
    writer = GGUFWriter(adapter, "llama")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    for name in (Q, "blk.1.attn_output.weight"):
        writer.add_tensor(f"{name}.lora_a", rng.normal(size=(4, N_EMBD)).astype(np.float32))
        writer.add_tensor(f"{name}.lora_b", rng.normal(size=(N_EMBD, 4)).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    whole = write(DENSE, tmp_path / "whole.gguf")
    parts, _ = split_channels(DENSE, linear(DENSE))
    expected = patched.run(whole, adapters=[adapter])
    actual = patched.run(parts.write(tmp_path / "split.gguf"), adapters=[adapter])
    np.testing.assert_allclose(actual.logits, expected.logits, atol=1e-4)
    assert np.abs(expected.logits - patched.run(whole).logits).max() > 1e-2


# -- refusals (more: tests/attacks/split_files.py) ------------------------------------------------------


def test_refuses_an_architecture_that_bypasses_the_sum(patched: LogitsProcess, tmp_path: Path) -> None:
    parts, _ = split_channels(plm(), [Q])
    answer = patched.run(parts.write(tmp_path / "plm.gguf"))
    assert answer.refused == "context"
    assert f"architecture 'plm' uses tensor '{Q}' without its sub-weights" in answer.log


@pytest.mark.oracle
def test_unpatched_library_refuses(stock: LogitsProcess, tmp_path: Path) -> None:
    parts, _ = split_channels(DENSE, [Q])
    answer = stock.run(parts.write(tmp_path / "split.gguf"))
    assert answer.refused == "model"
    assert f"tensor '{Q}' has wrong shape" in answer.log
