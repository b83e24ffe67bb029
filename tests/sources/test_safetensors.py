"""Safetensors files: every lie that a header can tell, and reading what sound ones hold."""

from __future__ import annotations

import gc
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gguf_splitquant.errors import CheckpointError
from gguf_splitquant.sources.safetensors import SafetensorsFile

from .handmade import header_of, write_raw, write_safetensors

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        "b.f32": random.standard_normal((7, 3, 2)).astype(np.float32),
        "a.f16": random.standard_normal((5, 4)).astype(np.float16),
        "c.vector": random.standard_normal(9).astype(np.float32),
        "d.i64": np.arange(3),
    }
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "m.safetensors")
    assert list(file.tensors) == sorted(tensors)
    for name, expected in tensors.items():
        stored = file.tensors[name]
        assert stored.shape == expected.shape
        if name != "d.i64":
            assert np.array_equal(stored.read_rows(0, len(expected)), expected)
            assert np.array_equal(stored.read_rows(1, 3), expected[1:3])
            assert stored.read_rows(2, 2).shape == (0, *expected.shape[1:])


def test_bf16_comes_as_bit_patterns(tmp_path: Path) -> None:
    header = {"t": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
    path = write_raw(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes.fromhex("803f00c0ff7f"))
    assert SafetensorsFile(path).tensors["t"].read_rows(0, 3).tolist() == [0x3F80, 0xC000, 0x7FFF]


def test_threads_share_one_file(tmp_path: Path) -> None:
    values = np.arange(4096 * 8, dtype=np.float32).reshape(4096, 8)
    save_file({"t": values}, tmp_path / "m.safetensors")
    stored = SafetensorsFile(tmp_path / "m.safetensors").tensors["t"]
    with ThreadPoolExecutor(8) as pool:
        slabs = list(pool.map(lambda i: stored.read_rows(i * 64, i * 64 + 64), range(64)))
    assert np.array_equal(np.concatenate(slabs), values)


def test_closes_with_its_last_tensor(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": A})
    stored = SafetensorsFile(path).tensors["a"]
    descriptor = stored.file._descriptor
    gc.collect()
    assert stored.read_rows(0, 2).shape == (2, 2)
    del stored
    gc.collect()
    with pytest.raises(OSError):
        os.fstat(descriptor)


def test_a_refused_file_is_closed(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": A}, 15)
    before = set(Path("/proc/self/fd").iterdir())
    with pytest.raises(CheckpointError):
        SafetensorsFile(path)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_closed_file_reads_nothing(tmp_path: Path) -> None:
    """Its descriptor may belong to another file by now."""
    file = SafetensorsFile(write_safetensors(tmp_path / "m.safetensors", {"a": A}))
    file.close()
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.tensors["a"].read_rows(0, 1)


def test_rows_out_of_range_are_a_bug(tmp_path: Path) -> None:
    stored = SafetensorsFile(write_safetensors(tmp_path / "m.safetensors", {"a": A})).tensors["a"]
    for start, stop in ((0, 3), (-1, 1), (2, 1)):
        with pytest.raises(IndexError):
            stored.read_rows(start, stop)


def test_file_that_shrinks_while_read(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "m.safetensors", {"a": A})
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 3)
    with pytest.raises(CheckpointError, match=r"m\.safetensors: ends 3 bytes early"):
        file.tensors["a"].read_rows(0, 2)


@pytest.mark.parametrize("dtype", ["I64", "F64", "U8"])
def test_other_types_are_named_when_used(tmp_path: Path, dtype: str) -> None:
    file = SafetensorsFile(write_safetensors(tmp_path / "m.safetensors", header_of({"x": [2]}, dtype)))
    with pytest.raises(CheckpointError, match=f"m.safetensors: tensor x: stored as {dtype}") as caught:
        _ = file.tensors["x"].float_type
    assert caught.value.fix


@pytest.mark.parametrize("size", [0, 7])
def test_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "m.safetensors").write_bytes(bytes(size))
    with pytest.raises(CheckpointError, match="too short"):
        SafetensorsFile(tmp_path / "m.safetensors")


def test_missing_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be opened \(No such file"):
        SafetensorsFile(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be opened \(not an ordinary file"):
        SafetensorsFile(tmp_path)


BITS = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "F8_E4M3": 8, "C64": 64, "F4": 4}
odd_numbers = st.sampled_from([-1, 0, 1, 4, 2**31, 2**63, 2**64, True, 1.0, None, "2"])


@st.composite
def headers(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """A sound header and data size, with up to two values changed."""
    header: dict[str, Any] = {}
    position = 0
    tensors = st.tuples(st.sampled_from(sorted(BITS)), st.lists(st.integers(0, 4), max_size=3))
    for name, (dtype, shape) in draw(st.dictionaries(st.sampled_from("abc"), tensors, min_size=1)).items():
        end = position + int(np.prod(shape)) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    for _ in range(draw(st.integers(0, 2))):
        entry = header[draw(st.sampled_from(sorted(header)))]
        match draw(st.sampled_from(["dtype", "shape", "offset", "size"])):
            case "dtype":
                entry["dtype"] = draw(st.sampled_from([*BITS, "X", None]))
            case "shape":
                entry["shape"] = [*entry["shape"], draw(odd_numbers)]
            case "offset":
                entry["data_offsets"][draw(st.integers(0, 1))] = draw(odd_numbers | st.integers(0, 60))
            case "size":
                position = max(0, position + draw(st.integers(-3, 3)))
    return header, position


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(headers())
def test_accepts_what_the_rust_crate_accepts(tmp_path: Path, case: tuple[dict[str, Any], int]) -> None:
    """The reference implementation takes and refuses the same files, and sees the same names and shapes."""
    header, n_data = case
    path = write_raw(tmp_path / "m.safetensors", json.dumps(header).encode(), bytes(n_data))
    try:
        mine = {name: list(t.shape) for name, t in SafetensorsFile(path).tensors.items()}
    except CheckpointError:
        mine = None
    try:
        with safe_open(path, "np") as file:
            theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError:
        theirs = None
    if theirs and any(size >= 2**63 for shape in theirs.values() for size in shape):
        # the crate takes an empty tensor of such a shape; no numpy array can have it
        theirs = None
    event("accepted" if mine is not None else "refused")
    assert mine == theirs


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 400), st.binary(min_size=1, max_size=8), st.integers(0, 80))
def test_damaged_anywhere(tmp_path: Path, position: int, junk: bytes, cut: int) -> None:
    """A sound file with junk in one place and its end cut off is read, or refused as a checkpoint error."""
    path = write_safetensors(tmp_path / "m.safetensors", {"a": A, "b": B})
    content = bytearray(path.read_bytes())
    content[position : position + len(junk)] = junk
    path.write_bytes(content[: len(content) - cut])
    try:
        file = SafetensorsFile(path)
        for stored in file.tensors.values():
            if stored.shape:
                stored.read_rows(0, stored.shape[0])
    except CheckpointError as error:
        assert "m.safetensors" in str(error) and error.fix
