"""GGUF files byte by byte, so that any part of them can be a lie."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
"""Types of values."""
TYPE_F32, TYPE_Q4_0, TYPE_I32 = 0, 2, 26
"""Types of tensors."""


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes, length: int | None = None) -> bytes:
    """A string, which claims ``length`` bytes."""
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw) if length is None else length) + raw


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    """A key and its value."""
    return string(key) + u32(kind) + value


def array(kind: int, items: bytes, count: int) -> bytes:
    """The value of an array."""
    return u32(kind) + u64(count) + items


def tensor(name: str | bytes, dims: Sequence[int], kind: int = TYPE_F32, offset: int = 0) -> bytes:
    """The entry of a tensor; ``dims`` in GGUF's order."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


ARCHITECTURE = pair("general.architecture", STRING, string("llama"))


@dataclass(frozen=True)
class Raw:
    """A file; ``n_tensors`` and ``n_pairs`` are what it claims."""

    pairs: Sequence[bytes] = (ARCHITECTURE,)
    tensors: Sequence[bytes] = (tensor("token_embd.weight", (32, 2)),)
    data: bytes = bytes(256)
    n_tensors: int | None = None
    n_pairs: int | None = None
    version: int = 3
    alignment: int = 32
    more: bytes = field(default=b"")

    def bytes(self) -> bytes:
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_pairs = len(self.pairs) if self.n_pairs is None else self.n_pairs
        head = b"GGUF" + u32(self.version) + u64(n_tensors) + u64(n_pairs)
        head += b"".join(self.pairs) + b"".join(self.tensors) + self.more
        return head + bytes(-len(head) % self.alignment) + self.data
