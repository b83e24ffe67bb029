"""A GGUF file taken apart into bytes: nothing is interpreted that a comparison does not need.

gguf-py's reader takes seconds for a real vocabulary, and reads values, where the bytes are what has to agree.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
ALIGNMENT = 32


@dataclass(frozen=True)
class RawGGUF:
    """``pairs``: type and value by key; ``tensors``: dimensions, type and data by name. In file order."""

    pairs: dict[str, bytes]
    tensors: dict[str, tuple[tuple[int, ...], int, bytes]]


def read_raw(path: Path) -> RawGGUF:
    """Read a whole file."""
    data = path.read_bytes()
    assert data[:4] == b"GGUF"
    version, n_tensors, n_pairs = struct.unpack_from("<IQQ", data, 4)
    assert version == 3
    at = 24

    def number(form: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from(form, data, at)
        at += struct.calcsize(form)
        return int(value)

    def string() -> str:
        nonlocal at
        length = number("<Q")
        at += length
        return data[at - length : at].decode()

    def skip(kind: int) -> None:
        nonlocal at
        if kind == STRING:
            at += struct.unpack_from("<Q", data, at)[0] + 8
        elif kind == ARRAY:
            item, count = number("<I"), number("<Q")
            if item == STRING:
                for _ in range(count):
                    skip(item)
            else:
                at += count * SCALAR_BYTES[item]
        else:
            at += SCALAR_BYTES[kind]

    pairs = {}
    for _ in range(n_pairs):
        key, start = string(), at
        skip(number("<I"))
        assert key not in pairs
        pairs[key] = data[start:at]
    entries = []
    for _ in range(n_tensors):
        name = string()
        shape = tuple(number("<Q") for _ in range(number("<I")))
        entries.append((name, shape, number("<I"), number("<Q")))
    data_start = -(-at // ALIGNMENT) * ALIGNMENT
    tensors = {}
    for name, shape, kind, offset in entries:
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
        n_bytes = size
        for length in shape:
            n_bytes *= length
        first = data_start + offset
        tensors[name] = (shape, kind, data[first : first + n_bytes // values])
    return RawGGUF(pairs, tensors)
