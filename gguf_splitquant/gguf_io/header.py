"""Read what a GGUF file says about itself: metadata and tensor list, in milliseconds.

gguf-py's reader makes several numpy objects per token of the vocabulary, which takes seconds for questions
that concern a hundred bytes (how large is it, how was it made). This one walks the header once, steps over
the vocabulary, and believes nothing: every length is checked against the file.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from ..errors import GGUFError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
"""``GGML_MAX_DIMS`` (ggml.h)."""

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT64: "<d",
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: as in the file.
        shape: numpy order (rows first).
        qtype: ggml type.
        offset: absolute position of its data.
        nbytes: size of its data.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    offset: int
    nbytes: int

    @property
    def n_params(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class LongArray:
    """Stands for an array of the tokenizer, which is stepped over."""

    length: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says about itself.

    Attributes:
        path: the file.
        metadata: key to value: numbers, strings, numpy arrays of numbers, lists of strings, and
            :class:`LongArray` for the tokenizer's.
        tensors: in file order.
        file_bytes: size of the file.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[TensorEntry]
    file_bytes: int


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file of version 2 or 3.

    Raises:
        GGUFError: the file cannot be read, is not GGUF, is damaged or truncated, or is one shard of several.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Walker(path, data).header()
    except (OSError, ValueError) as error:
        # mmap of an empty file is a ValueError
        raise GGUFError(path, f"cannot be read: {error}", "give the path of a GGUF file") from error


class _Walker:
    """A position in the header that only moves forward, within the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._data[:4] != _MAGIC:
            raise self._damaged(f"is not GGUF: it begins with {self._data[:4]!r}")
        self._at = 4
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._damaged(f"has version {version}, and only 2 and 3 (little-endian) are known")
        n_tensors, n_pairs = self._number("<Q"), self._number("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = self._string()
            metadata[key] = self._value(key, self._type())
        if int(metadata.get(Keys.Split.LLM_KV_SPLIT_COUNT, 0)) > 1:
            raise GGUFError(
                self._path,
                f"is one of {metadata[Keys.Split.LLM_KV_SPLIT_COUNT]} shards",
                "merge them with llama.cpp's `llama-gguf-split --merge`",
            )
        entries = [self._tensor_info() for _ in range(n_tensors)]
        alignment = int(metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT))
        if alignment <= 0:
            raise self._damaged(f"has an alignment of {alignment}")
        data_start = -(-self._at // alignment) * alignment
        tensors = tuple(self._placed(entry, data_start) for entry in entries)
        if len({tensor.name for tensor in tensors}) != len(tensors):
            raise self._damaged("has two tensors of the same name")
        return GGUFHeader(self._path, metadata, tensors, len(self._data))

    def _tensor_info(self) -> TensorEntry:
        name = self._string()
        n_dims = self._number("<I")
        if not 1 <= n_dims <= _MAX_DIMENSIONS:
            raise self._damaged(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(int(self._number("<Q")) for _ in range(n_dims))[::-1]
        type_number = self._number("<I")
        offset = self._number("<Q")
        try:
            qtype = GGMLQuantizationType(type_number)
        except ValueError:
            raise self._damaged(f"tensor {name} has the unknown type {type_number}") from None
        block, block_bytes = GGML_QUANT_SIZES[qtype]
        if shape[-1] % block:
            raise self._damaged(f"tensor {name}: rows of {shape[-1]} are not whole {qtype.name} blocks")
        count = 1
        for n in shape:
            count *= n
        return TensorEntry(name, shape, qtype, offset, count // block * block_bytes)

    def _placed(self, entry: TensorEntry, data_start: int) -> TensorEntry:
        start = data_start + entry.offset
        if start + entry.nbytes > len(self._data):
            raise self._damaged(
                f"is truncated: tensor {entry.name} ends at byte {start + entry.nbytes} of {len(self._data)}"
            )
        return TensorEntry(entry.name, entry.shape, entry.qtype, start, entry.nbytes)

    def _value(self, key: str, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        return self._number(_SCALARS[kind])

    def _array(self, key: str) -> Any:
        kind, length = self._type(), self._number("<Q")
        if kind is GGUFValueType.ARRAY:
            raise self._damaged(f"{key} is an array of arrays")
        skipped = key.startswith("tokenizer.")
        if kind is GGUFValueType.STRING:
            if skipped:
                for _ in range(length):
                    self._take(self._number("<Q"))
                return LongArray(length)
            return [self._string() for _ in range(length)]
        dtype = np.dtype(_SCALARS[kind])
        raw = self._take(length * dtype.itemsize)
        return LongArray(length) if skipped else np.frombuffer(raw, dtype=dtype)

    def _type(self) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._damaged(f"has a value of the unknown type {number} before byte {self._at}") from None

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, length: int) -> bytes:
        end = self._at + length
        if end > len(self._data):
            raise self._damaged(f"ends inside its header, at byte {len(self._data)} of at least {end}")
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _damaged(self, cause: str) -> GGUFError:
        return GGUFError(self._path, cause, "make or download the file again")
