"""Safetensors files: every lie that a header can tell."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gguf_splitquant.sources.safetensors import MAX_HEADER_BYTES
from tests.attacks.attack import Attack, content
from tests.sources.handmade import write_raw

A = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}

_HEADERS: dict[str, tuple[dict[str, Any], int, str]] = {
    "end past the file": ({"a": A, "b": B}, 20, "tensor b: ends at byte 24 of 20"),
    "far past the file": (
        {"a": {"dtype": "U8", "shape": [2**62], "data_offsets": [0, 2**62]}},
        16,
        "tensor a: ends at byte 4611686018427387904 of 16",
    ),
    "overlap": ({"a": A, "b": {**B, "data_offsets": [12, 20]}}, 20, "tensor b: overlaps .* by 4 bytes"),
    "the same bytes twice": ({"a": A, "b": A}, 16, "tensor b: overlaps .* by 16 bytes"),
    "gap": ({"a": A, "b": {**B, "data_offsets": [20, 28]}}, 28, "tensor b: a gap of 4 bytes"),
    "gap at the start": ({"b": B}, 24, "tensor b: a gap of 16 bytes"),
    "bytes behind the last": ({"a": A}, 17, "1 bytes behind the last tensor"),
    "negative offset": ({"a": {**A, "data_offsets": [-16, 0]}}, 16, "tensor a: data_offsets"),
    "end before start": ({"a": {**A, "data_offsets": [16, 0]}}, 16, "tensor a: data_offsets"),
    "offset too large": ({"a": {**A, "data_offsets": [0, 2**64]}}, 16, "tensor a: data_offsets"),
    "three offsets": ({"a": {**A, "data_offsets": [0, 8, 16]}}, 16, "tensor a: data_offsets"),
    "offsets as text": ({"a": {**A, "data_offsets": "16"}}, 16, "tensor a: data_offsets"),
    "fractional offset": ({"a": {**A, "data_offsets": [0, 16.0]}}, 16, "tensor a: data_offsets"),
    "offset true": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, True]}},
        1,
        "tensor a: data_offs",
    ),
    "negative shape": ({"a": {**A, "shape": [-2, -2]}}, 16, "tensor a: shape"),
    "shape of text": ({"a": {**A, "shape": ["4"]}}, 16, "tensor a: shape"),
    "shape is null": ({"a": {**A, "shape": None}}, 16, "tensor a: shape"),
    "shape too small": ({"a": {**A, "shape": [3]}}, 16, r"tensor a: F32 \[3\] takes 12 bytes, .* span 16"),
    "product that wraps at 64 bits": (
        {"a": {**A, "shape": [2**62, 4, 2**62]}},
        16,
        r"tensor a: .* takes more than 2\^67 bytes",
    ),
    "product of many digits": ({"a": {**A, "shape": [2**62] * 999}}, 16, "tensor a: 999 dimensions"),
    "product of 32 dimensions": ({"a": {**A, "shape": [2**62] * 32}}, 16, r"more than 2\^67 bytes"),
    "wrong dtype for the span": ({"a": {**A, "dtype": "F64"}}, 16, "tensor a: F64 .* takes 32 bytes"),
    "unknown dtype": ({"a": {**A, "dtype": "F31"}}, 16, "tensor a: unknown dtype 'F31'"),
    "dtype is a list": ({"a": {**A, "dtype": ["F32"]}}, 16, "tensor a: unknown dtype"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, 16, "tensor a: header entry lacks"),
    "entry is a list": ({"a": []}, 0, "tensor a: header entry lacks"),  # type: ignore[dict-item]
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": A}, 16, "__metadata__ is not a map of strings"),
}

_RAW: dict[str, tuple[bytes, int | None, str]] = {
    "duplicate tensor": (b'{"a":1,"a":2}', None, "'a' appears twice"),
    "duplicate field": (b'{"a":{"dtype":"U8","dtype":"F32"}}', None, "'dtype' appears twice"),
    "not JSON": (b"{", None, "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', None, "not valid JSON"),
    "a list": (b"[]", None, "not a JSON object"),
    "nested too deep": (b'{"a":' + b"[" * 200_000, None, "not valid JSON"),
    "a number of a million digits": (b'{"a":' + b"9" * 1_000_000 + b"}", None, "not valid JSON"),
    "2^60": (b"{}", 2**60, "not a safetensors file"),
    # bombs: a hundred bytes of memory for each byte of the file
    "a hundred megabytes of lists": (b'{"a":[' + b"[],[],[],[],[]," * 6_000_000 + b"[]]}", None, "parts"),
    "a hundred megabytes of objects": (b'{"a":[' + b'{"":0},' * 14_000_000 + b"0]}", None, "parts"),
    "fifty million numbers": (b'{"a":[' + b"0," * 49_000_000 + b"0]}", None, "parts"),
    "a hundred megabytes of one name": (
        b'{"' + b"a" * 99_000_000 + b'":0}',
        None,
        "a name of 99000000 characters",
    ),
    "terminal codes in a name": (b'{"\\u001b[2Ja":{}}', None, r"tensor \?\[2Ja: header entry lacks"),
    "a shape of a million sizes": (
        b'{"a":{"dtype":"U8","shape":[' + b"9223372036854775807," * 900_000 + b'1],"data_offsets":[0,1]}}',
        None,
        "900001 dimensions",
    ),
    "empty": (b"", None, "not valid JSON"),
    "longer than the file": (b"{}", 3, "cut short: a header of 3 bytes"),
    "over the limit": (b"{}", MAX_HEADER_BYTES + 1, "not a safetensors file"),
    "2^64 - 1": (b"{}", 2**64 - 1, "not a safetensors file"),
}


def _header(header: dict[str, Any], n_data: int) -> Callable[[Path], Path]:
    return lambda folder: write_raw(folder / "m.safetensors", json.dumps(header).encode(), bytes(n_data))


def _raw(header: bytes, length: int | None) -> Callable[[Path], Path]:
    return lambda folder: write_raw(folder / "m.safetensors", header, b"", length)


def _pipe(folder: Path) -> Path:
    os.mkfifo(folder / "m.safetensors")
    return folder / "m.safetensors"


def _endless(folder: Path) -> Path:
    (folder / "m.safetensors").symlink_to("/dev/zero")
    return folder / "m.safetensors"


ATTACKS = [
    *(Attack(name, _header(header, n_data), error) for name, (header, n_data, error) in _HEADERS.items()),
    *(Attack(name, _raw(header, length), error) for name, (header, length, error) in _RAW.items()),
    Attack("no byte", content(b""), "0 bytes, too short"),
    Attack("seven bytes", content(bytes(7)), "7 bytes, too short"),
    Attack("a pipe that nobody writes to", _pipe, "not an ordinary file"),
    Attack("a link to a device", _endless, "not an ordinary file"),
]
