"""Sizes of files, and headers that lie."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import GGUFError
from gguf_splitquant.evaluation.contents import base_name, read_contents
from gguf_splitquant.gguf_io.header import LongArray, read_header


def write(path: Path, tensors: dict[str, np.ndarray], **pairs: int) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(77)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "é" * 40])
    writer.add_array("tokenizer.ggml.scores", [0.5, 1.5])
    writer.add_array("splitquant.quantized_tensors", ["blk.0.attn_q.weight"])
    writer.add_array("some.numbers", [3, 1, 2])
    writer.add_bool("some.flag", True)
    writer.add_float64("some.float", 0.1)
    for key, value in pairs.items():
        writer.add_uint64(key.replace("__", "."), value)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.Q4_0 if "attn" in name else None
        data = gguf.quants.quantize(values, kind) if kind else values
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


MODEL = {
    "token_embd.weight": np.ones((10, 32), np.float32),
    "blk.0.attn_q.weight": np.ones((32, 32), np.float32),
    "blk.0.attn_q.split1.weight": np.ones((32, 32), np.float32),
    "blk.0.attn_q.split2.weight": np.ones((32, 32), np.float32),
    "blk.0.ffn_norm.weight": np.ones(32, np.float32),
    "blk.0.ffn_up.bias": np.ones(32, np.float32),
}
TRUE_PARAMS = 10 * 32 + 32 * 32 + 32 + 32


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write(tmp_path / "model.gguf", MODEL)


def test_header_agrees_with_gguf_py(model: Path) -> None:
    header = read_header(model)
    reference = gguf.GGUFReader(model)
    assert [(t.name, t.shape, t.qtype, t.offset, t.nbytes, t.n_params) for t in header.tensors] == [
        (t.name, tuple(map(int, t.shape[::-1])), t.tensor_type, t.data_offset, t.n_bytes, t.n_elements)
        for t in reference.tensors
    ]
    plain = {key: field.contents() for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    plain["tokenizer.ggml.tokens"], plain["tokenizer.ggml.scores"] = LongArray(3), LongArray(2)
    found = dict(header.metadata)
    assert found.pop("some.numbers").tolist() == plain.pop("some.numbers") == [3, 1, 2]
    assert found == plain
    assert header.file_bytes == model.stat().st_size


def test_a_weight_counts_once_however_many_sub_layers_share_it(model: Path) -> None:
    contents = read_contents(model)
    assert contents.n_params == TRUE_PARAMS
    assert contents.linear_bpw == pytest.approx(3 * 4.5)
    assert contents.file_bpw == pytest.approx(8 * model.stat().st_size / TRUE_PARAMS)
    assert contents.context_length == 77
    assert contents.types == {"F32": 3, "Q4_0": 3}
    assert [len(group) for group in contents.layers.values()] == [1, 3, 1, 1]


def test_the_recorded_count_wins(tmp_path: Path) -> None:
    path = write(
        tmp_path / "m.gguf",
        {"blk.0.ffn_up.weight": np.ones((4, 32), np.float32)},
        splitquant__parameter_count=256,
    )
    contents = read_contents(path)
    assert (contents.n_params, contents.linear_bpw) == (256, 16.0)


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("blk.0.attn_q.split1.weight", "blk.0.attn_q.weight"),
        ("blk.0.attn_q.split10.bias", "blk.0.attn_q.bias"),
        ("blk.0.attn_q.weight", "blk.0.attn_q.weight"),
        ("blk.0.split0.weight", "blk.0.split0.weight"),
        ("blk.0.attn.split1.lora", "blk.0.attn.split1.lora"),
    ],
)
def test_base_name(name: str, base: str) -> None:
    assert base_name(name) == base


def test_refuses_one_shard_of_several(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {"x.weight": np.ones(4, np.float32)}, split__count=3, split__no=1)
    with pytest.raises(GGUFError, match=r"is one of 3 shards; give the first, m-00001-of-00003\.gguf"):
        read_header(path)


def test_truncated_anywhere(model: Path, tmp_path: Path) -> None:
    data = model.read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 600, 7), len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(GGUFError, match=r"cut\.gguf: "):
            read_header(path)


@settings(max_examples=150, deadline=None)
@given(position=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
def test_damage_is_an_error_or_harmless(
    position: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = bytearray(write(path, {"blk.0.ffn_up.weight": np.ones((4, 32), np.float32)}).read_bytes())
    data[position : position + len(value)] = value
    path.write_bytes(data)
    try:
        header = read_header(path)
    except GGUFError as error:
        assert "damaged.gguf" in str(error)
    else:
        assert all(t.offset + t.nbytes <= header.file_bytes for t in header.tensors)


def test_lies(tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    head = b"GGUF" + struct.pack("<I", 3)
    for data, message in [
        (b"PK\3\4 not a model", "is not GGUF: it begins with b'PK"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "has version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
        (head + struct.pack("<QQ", 0, 2**63), "announces 9223372036854775808 keys"),
        (head + struct.pack("<QQQ", 0, 1, 2**62) + b"key", "has a name of 4611686018427387904 bytes"),
        (head + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<I", 9), "tensor t has 9 dimensions"),
        (head + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 4, 99, 0), "unknown type 99"),
        (head + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 33, 2, 0), "not whole Q4_0"),
        (head + struct.pack("<QQQ", 1, 0, 1) + b"t" + struct.pack("<IQIQ", 1, 2**60, 0, 0), "is truncated"),
    ]:
        path.write_bytes(data)
        with pytest.raises(GGUFError, match=r"lie\.gguf: .*" + message):
            read_header(path)
    with pytest.raises(GGUFError, match="cannot be read"):
        read_header(tmp_path / "gone.gguf")
