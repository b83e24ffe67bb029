"""Read what a GGUF file says about itself: metadata and tensor list, in milliseconds.

gguf-py's reader makes several numpy objects per token of the vocabulary, which takes seconds for questions
that concern a hundred bytes (how large is it, how was it made). This one walks the header once, steps over
the vocabulary, and believes nothing: every length is checked against the file.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType, GGUFValueType, Keys

from ..bounded import open_regular
from ..errors import GGUFError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_DIMENSIONS = 4
"""``GGML_MAX_DIMS`` (ggml.h)."""

# An entry costs up to forty times its own bytes: the limits stand before anything is kept. Those on
# bytes and numbers of entries are ten or more times what the largest published files have.
_MAX_HEADER_BYTES = 256 << 20
_MAX_PAIRS = 10_000
_MAX_TENSORS = 500_000
_MAX_ITEMS = 6_000_000
"""Of all arrays together: four times the largest vocabulary with its scores, kinds and merges."""
_MAX_NAME = 1024
"""Of a tensor or key; llama.cpp takes 63 and 65,535."""

_SPLIT_NO = Keys.Split.LLM_KV_SPLIT_NO
_SPLIT_COUNT = Keys.Split.LLM_KV_SPLIT_COUNT
_SPLIT_TENSORS = Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT
SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.gguf$")
"""What the names of shards end in."""
_MAX_SHARDS = 65535

SCALARS: dict[GGUFValueType, str] = {
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


_U64 = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Attributes:
        name: as in the file.
        shape: numpy order (rows first).
        qtype: ggml type.
        offset: absolute position of its data.
        nbytes: size of its data.
        file: where that is: the file itself, or one of its shards.
    """

    name: str
    shape: tuple[int, ...]
    qtype: GGMLQuantizationType
    offset: int
    nbytes: int
    file: Path

    @property
    def n_params(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class LongArray:
    """Stands for an array of the tokenizer, which is stepped over."""

    length: int


@dataclass(frozen=True)
class GGUFHeader:
    """What a file says about itself.

    Attributes:
        path: the file; of a model in shards, the first.
        metadata: key to value: numbers, strings, numpy arrays of numbers, lists of strings, and
            :class:`LongArray` for the tokenizer's.
        tensors: in file order, shard by shard.
        file_bytes: size of the file, or of all shards.
        shards: all files of the model.
        further_metadata: what the shards after the first say, in order.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Sequence[TensorEntry]
    file_bytes: int
    shards: tuple[Path, ...]
    further_metadata: tuple[Mapping[str, Any], ...] = ()


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file of version 2 or 3, and of a model in shards the headers of all.

    Args:
        path: the file; of a model in shards, the first.

    Raises:
        GGUFError: a file cannot be read, is not GGUF, is damaged or truncated, or a shard is missing.
    """
    first = read_file_header(path)
    count = _shard_count(first)
    if count == 1:
        return first
    headers = [first, *(read_file_header(shard) for shard in _other_shards(first, count))]
    for number, header in enumerate(headers):
        said = (header.metadata.get(_SPLIT_NO), header.metadata.get(_SPLIT_COUNT))
        if said != (number, count):
            cause = f"says that it is shard {said[0]} of {said[1]} (from 0), and is named {number} of {count}"
            raise GGUFError(header.path, cause, "download all shards again")
    tensors = tuple(tensor for header in headers for tensor in header.tensors)
    total = first.metadata.get(_SPLIT_TENSORS, len(tensors))
    if total != len(tensors) or len({tensor.name for tensor in tensors}) != len(tensors):
        cause = f"its {count} shards hold {len(tensors)} tensors that are not the {total} that it announces"
        raise GGUFError(path, cause, "download all shards again")
    size = sum(header.file_bytes for header in headers)
    paths = tuple(header.path for header in headers)
    further = tuple(header.metadata for header in headers[1:])
    return GGUFHeader(path, first.metadata, tensors, size, paths, further)


def shard_path(prefix: Path, number: int, count: int) -> Path:
    """The name of shard ``number`` (from 0), as ``llama_split_path`` in llama.cpp has it."""
    return prefix.with_name(f"{prefix.name}-{number + 1:05d}-of-{count:05d}.gguf")


def _shard_count(header: GGUFHeader) -> int:
    count = header.metadata.get(_SPLIT_COUNT, 1)
    if not isinstance(count, int) or count > _MAX_SHARDS:
        raise GGUFError(header.path, f"{_SPLIT_COUNT} is {str(count)[:60]}", "download the file again")
    return max(1, count)


def _other_shards(first: GGUFHeader, count: int) -> list[Path]:
    """The paths behind the first shard's. Raises GGUFError unless that is what ``first`` is."""
    path = first.path
    prefix = SHARD_NAME.sub("", path.name).removesuffix(".gguf")
    paths = [shard_path(path.with_name(prefix), number, count) for number in range(count)]
    if path != paths[0]:
        number = first.metadata.get(_SPLIT_NO)
        raise GGUFError(
            path,
            f"is one of {count} shards"
            + (f", and its name is not that of the first, {paths[0].name}" if number == 0 else ""),
            f"give the first, {paths[0].name}" if number else "give the shards the names that they had",
        )
    missing = [shard.name for shard in paths if not shard.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GGUFError(path, f"its shard {missing[0]}{more} is missing", "download it into the same folder")
    return paths[1:]


def read_file_header(path: Path) -> GGUFHeader:
    """The header of one file, be it a shard or all of a model. Raises GGUFError as :func:`read_header`."""
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return HeaderWalker(path, data).header()
    except (OSError, ValueError) as error:
        # mmap of an empty file is a ValueError
        raise GGUFError(path, f"cannot be read: {error}", "give the path of a GGUF file") from error


class HeaderWalker:
    """A position in the header that only moves forward, within the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = 0
        self._array_items = 0

    def begin(self) -> tuple[int, int]:
        """Step over the first fields: the numbers of tensors and of key-value pairs."""
        if self._data[:4] != _MAGIC:
            raise self._damaged(f"is not GGUF: it begins with {self._data[:4]!r}")
        self._at = 4
        version = self._number("<I")
        if version not in _VERSIONS:
            raise self._damaged(f"has version {version}, and only 2 and 3 (little-endian) are known")
        n_tensors, n_pairs = self._number("<Q"), self._number("<Q")
        for count, most, what in ((n_tensors, _MAX_TENSORS, "tensors"), (n_pairs, _MAX_PAIRS, "keys")):
            if count > most:
                raise self._damaged(f"announces {count} {what}, and {most} is the most that is read")
        return n_tensors, n_pairs

    def header(self) -> GGUFHeader:
        """All of it."""
        n_tensors, n_pairs = self.begin()
        metadata: dict[str, Any] = {}
        for _ in range(n_pairs):
            key = self._name()
            if key in metadata:
                raise self._damaged(f"has the key {key[:200]} twice")
            metadata[key] = self._value(key, self._type())
        entries: dict[str, TensorEntry] = {}
        for _ in range(n_tensors):
            entry = self._tensor_info()
            if entry.name in entries:
                raise self._damaged(f"has two tensors of the same name, {entry.name}")
            entries[entry.name] = entry
        alignment = metadata.get(Keys.General.ALIGNMENT, GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise self._damaged(f"has an alignment of {str(alignment)[:60]}, which is no power of two")
        data_start = -(-self._at // alignment) * alignment
        tensors = tuple(self._placed(entry, data_start, alignment) for entry in entries.values())
        self._check_overlaps(tensors)
        return GGUFHeader(self._path, metadata, tensors, len(self._data), (self._path,))

    def _check_overlaps(self, tensors: Sequence[TensorEntry]) -> None:
        end, before = 0, ""
        for tensor in sorted((t for t in tensors if t.nbytes), key=lambda t: t.offset):
            if tensor.offset < end:
                raise self._damaged(f"tensor {tensor.name} overlaps tensor {before}")
            end, before = tensor.offset + tensor.nbytes, tensor.name

    def _tensor_info(self) -> TensorEntry:
        name = self._name()
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
        # as ggml checks it: also where another dimension is 0
        count = math.prod(shape)
        if math.prod(max(n, 1) for n in shape) >= 2**63:
            raise self._damaged(f"tensor {name} has the impossible shape {list(shape)}")
        return TensorEntry(name, shape, qtype, offset, count // block * block_bytes, self._path)

    def _placed(self, entry: TensorEntry, data_start: int, alignment: int) -> TensorEntry:
        start = data_start + entry.offset
        if entry.offset % alignment:
            raise self._damaged(f"tensor {entry.name} begins at {entry.offset}, no multiple of {alignment}")
        if start + entry.nbytes > len(self._data):
            raise self._damaged(
                f"is truncated: tensor {entry.name} ends at byte {start + entry.nbytes} of {len(self._data)}"
            )
        return dataclasses.replace(entry, offset=start)

    def _value(self, key: str, kind: GGUFValueType) -> Any:
        if kind is GGUFValueType.STRING:
            return self._string()
        if kind is GGUFValueType.ARRAY:
            return self._array(key)
        return self._number(SCALARS[kind])

    def _array(self, key: str) -> Any:
        kind, length = self.array_head(key)
        skipped = key.startswith("tokenizer.")
        if kind is GGUFValueType.STRING:
            if skipped:
                self._skip_strings(length)
                return LongArray(length)
            return [self._string() for _ in range(length)]
        dtype = np.dtype(SCALARS[kind])
        raw = self._take(length * dtype.itemsize)
        return LongArray(length) if skipped else np.frombuffer(raw, dtype=dtype)

    def _skip_strings(self, count: int) -> None:
        """Step over strings, most of the time that a header takes."""
        at, data, length_at = self._at, self._data, _U64.unpack_from
        try:
            for _ in range(count):
                at += 8 + length_at(data, at)[0]
        except (struct.error, OverflowError):
            # a length, or what it announces, is behind the end
            at = max(at, len(data)) + 8
        self._step(at - self._at)

    def array_head(self, key: str) -> tuple[GGUFValueType, int]:
        """Step over the type and the number of an array's items."""
        kind, length = self._type(), self._number("<Q")
        if kind is GGUFValueType.ARRAY:
            raise self._damaged(f"{key[:200]} is an array of arrays")
        self._array_items += length
        if self._array_items > _MAX_ITEMS:
            cause = f"{key[:200]} has {length} items, {self._array_items} with those of the arrays before"
            raise self._damaged(f"{cause}, and {_MAX_ITEMS} is the most that is read")
        return kind, length

    def _type(self) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError:
            raise self._damaged(f"has a value of the unknown type {number} before byte {self._at}") from None

    def _name(self) -> str:
        length = self._number("<Q")
        if length > _MAX_NAME:
            raise self._damaged(f"has a name of {length} bytes before byte {self._at}")
        return self._take(length).decode("utf-8", "replace")

    def _string(self) -> str:
        return self._take(self._number("<Q")).decode("utf-8", "replace")

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, length: int) -> bytes:
        start = self._at
        self._step(length)
        return self._data[start : self._at]

    def _step(self, length: int) -> None:
        end = self._at + length
        if end > len(self._data):
            raise self._damaged(f"ends inside its header, at byte {len(self._data)} of at least {end}")
        if end > _MAX_HEADER_BYTES:
            raise self._damaged(f"has a header of more than {_MAX_HEADER_BYTES} bytes")
        self._at = end

    def _damaged(self, cause: str) -> GGUFError:
        return GGUFError(self._path, cause, "make or download the file again")
