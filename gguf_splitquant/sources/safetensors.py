"""Reading safetensors files: what the header says is checked before a byte of it is believed.

The ``safetensors`` package would map the file into memory; :mod:`.reading` says why that is not done here.

Format: https://github.com/huggingface/safetensors#format. The limits and the demand that tensors fill the
data section without a gap are those of its Rust crate (``safetensors/src/tensor.rs``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from ..bounded import parse_json
from ..errors import CheckpointError
from .model import FloatType
from .reading import DOWNLOAD_AGAIN, PositionedFile, StoredRows

MAX_HEADER_BYTES = 100_000_000
"""As in the Rust crate: a longer header is refused unread."""

_MAX_NAME = 1000
_MAX_DIMENSIONS = 32
"""Of any numpy array before version 2; a product of many more would take minutes."""

_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file, not yet read.

    Attributes:
        name: name in the checkpoint.
        dtype: as the header spells it, such as ``BF16``; not necessarily a float type.
        shape: as in the header.
        offset: first byte, counted from the start of the file.
        file: the file that holds it; stays open as long as one of its tensors is referenced.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    file: SafetensorsFile

    @property
    def origin(self) -> str:
        """File and name, for error messages."""
        return f"{self.file.path.name}: tensor {self.name}"

    @property
    def float_type(self) -> FloatType:
        """Its type; raises CheckpointError where that is not F32, F16 or BF16."""
        try:
            return FloatType(self.dtype)
        except ValueError:
            raise CheckpointError(
                self.origin,
                f"stored as {self.dtype}, not as F32, F16 or BF16",
                "convert from the original float checkpoint",
            ) from None

    @property
    def read_rows(self) -> StoredRows:
        """Reads its rows, raw (``float_type.raw_dtype``)."""
        return StoredRows(self.file, self.offset, self.shape, self.float_type.raw_dtype)


class SafetensorsFile(PositionedFile):
    """A safetensors file with a checked header.

    Args:
        path: the file; opened once, closed by :meth:`close` or when its last tensor is gone.

    Raises:
        CheckpointError: the file cannot be opened, is cut short, or its header is not sound.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            self.tensors: Mapping[str, StoredTensor] = MappingProxyType(self._index(self.size))
        except BaseException:
            self.close()
            raise

    def _refuse(self, cause: str, fix: str = DOWNLOAD_AGAIN) -> NoReturn:
        raise CheckpointError(self.path, cause, fix)

    def _index(self, size: int) -> dict[str, StoredTensor]:
        """Header and file size to tensors, sorted by name."""
        if size < 8:
            self._refuse(f"{size} bytes, too short for a safetensors file")
        prefix = bytearray(8)
        self.read_into(memoryview(prefix), 0)
        header_bytes = int.from_bytes(prefix, "little")
        if prefix == b"version ":
            raise CheckpointError(
                self.path, "a Git LFS pointer, not the weights themselves", "run `git lfs pull` in its folder"
            )
        if header_bytes > MAX_HEADER_BYTES:
            self._refuse(
                f"not a safetensors file: a header of {header_bytes} bytes, the limit is {MAX_HEADER_BYTES}"
            )
        if header_bytes > size - 8:
            self._refuse(f"cut short: a header of {header_bytes} bytes in a file of {size}")
        raw = bytearray(header_bytes)
        self.read_into(memoryview(raw), 8)
        header = self._parse(bytes(raw))

        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            self._refuse("header: __metadata__ is not a map of strings")

        spans: list[tuple[int, int, str]] = []
        tensors: dict[str, StoredTensor] = {}
        for name, entry in sorted(header.items()):
            if len(name) > _MAX_NAME:
                self._refuse(f"tensor {name[:60]}...: a name of {len(name)} characters")
            dtype, shape, begin, end = self._entry(name, entry)
            spans.append((begin, end, name))
            tensors[name] = StoredTensor(name, dtype, shape, 8 + header_bytes + begin, self)
        self._check_spans(sorted(spans), size - 8 - header_bytes)
        return tensors

    def _parse(self, raw: bytes) -> dict[str, Any]:
        def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
            fields = dict(pairs)
            if len(fields) != len(pairs):
                twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
                self._refuse(f"header: {twice[:200]!r} appears twice")
            return fields

        try:
            header = parse_json(raw, object_pairs_hook=no_duplicates)
        except ValueError as error:
            raise CheckpointError(self.path, f"header is not valid JSON ({error})", DOWNLOAD_AGAIN) from error
        if not isinstance(header, dict):
            self._refuse("header is not a JSON object")
        return header

    def _entry(self, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
        """One header entry, checked by itself: dtype, shape, first and last byte in the data section."""
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            self._refuse(f"tensor {name}: header entry lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
            self._refuse(f"tensor {name}: unknown dtype {str(dtype)[:40]!r}")
        if not _are_sizes(shape):
            self._refuse(f"tensor {name}: shape {str(shape)[:80]} is not a list of sizes")
        if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            self._refuse(f"tensor {name}: data_offsets {str(offsets)[:80]} are not a range")
        if len(shape) > _MAX_DIMENSIONS:
            self._refuse(f"tensor {name}: {len(shape)} dimensions")
        bits = _DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        begin, end = offsets
        if bits != 8 * (end - begin):
            self._refuse(
                f"tensor {name}: {dtype} {shape} takes {_bytes(bits)} bytes, data_offsets span {end - begin}"
            )
        return dtype, tuple(shape), begin, end

    def _check_spans(self, spans: list[tuple[int, int, str]], data_bytes: int) -> None:
        """Tensors have to fill the data section, one behind the other."""
        position = 0
        for begin, end, name in spans:
            if end > data_bytes:
                self._refuse(
                    f"tensor {name}: ends at byte {end} of {data_bytes}: the file is cut short, or lies"
                )
            if begin < position:
                self._refuse(f"tensor {name}: overlaps the tensor before it by {position - begin} bytes")
            if begin > position:
                self._refuse(f"tensor {name}: a gap of {begin - position} bytes before it")
            position = end
        if position != data_bytes:
            self._refuse(f"{data_bytes - position} bytes behind the last tensor")


def _are_sizes(values: Any) -> bool:
    """A JSON list of integers from 0 up; True and 1.0 are none."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _bytes(bits: int) -> str:
    # a hostile shape may multiply up to a number of thousands of digits
    return str(-(-bits // 8)) if bits < 2**70 else "more than 2^67"
