"""Where everything lies in the file: header bytes and tensor offsets, from the plan alone.

gguf-py serializes the header; the offsets follow its rule (each tensor starts at the next multiple of the
alignment). Knowing them first lets tensors be written in any order, by several threads, at their places.
"""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFValue, GGUFValueType, GGUFWriter

from ..errors import OutputError
from ..planning.plan import OutputTensor
from .pairs import item_type

_ALIGNMENT: int = GGUF_DEFAULT_ALIGNMENT


@dataclass(frozen=True)
class FileLayout:
    """Byte positions of one GGUF file.

    Attributes:
        header: everything before the tensor data, padded to the alignment.
        offsets: absolute position of each tensor by name.
        total_bytes: size of the complete file.
    """

    header: bytes
    offsets: Mapping[str, int]
    total_bytes: int


def build_layout(
    architecture: str, metadata: Mapping[str, GGUFValue], outputs: Sequence[OutputTensor]
) -> FileLayout:
    """Lay out a file.

    Args:
        architecture: ``general.architecture``.
        metadata: all key-value pairs, in file order.
        outputs: all tensors, in file order; names are unique.

    Raises:
        OutputError: the system's temporary folder has no room for the header.
    """
    header = _padded(_serialize_header(architecture, metadata, outputs))
    offsets = {}
    position = len(header)
    for tensor in outputs:
        offsets[tensor.name] = position
        position += aligned(tensor.nbytes)
    return FileLayout(header, offsets, position)


def _serialize_header(
    architecture: str, metadata: Mapping[str, GGUFValue], outputs: Sequence[OutputTensor]
) -> bytes:
    writer = _Writer(None, architecture)
    writer.kv_data[0] = dict(metadata)
    for tensor in outputs:
        writer.add_tensor_info(
            tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.qtype
        )
    # gguf-py writes to paths only
    try:
        with tempfile.TemporaryDirectory(prefix="gguf-splitquant-") as folder:
            path = Path(folder) / "header"
            writer.write_header_to_file(path)
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            writer.close()
            return path.read_bytes()
    except OSError as error:
        raise OutputError(
            "temporary folder", f"cannot hold the header: {error.strerror or error}", "set TMPDIR to another"
        ) from error


class _Writer(GGUFWriter):  # type: ignore[misc]  # gguf-py has no types
    """gguf-py packs arrays item by item, half a second for a large vocabulary. Here at once, same bytes."""

    def _pack_val(
        self, val: Any, vtype: GGUFValueType, add_vtype: bool, sub_type: GGUFValueType | None = None
    ) -> bytes:
        kind = sub_type
        if vtype is not GGUFValueType.ARRAY or not isinstance(val, list):
            kind = None
        elif kind is None:
            kind = item_type(val)
        code = self._simple_value_packing.get(kind) if kind is not None else None
        if not val or (code is None and kind is not GGUFValueType.STRING):
            packed: bytes = super()._pack_val(val, vtype, add_vtype, sub_type)
            return packed
        if code is not None:
            items = struct.pack(f"<{len(val)}{code}", *val)
        else:
            encoded = [item.encode("utf-8") if isinstance(item, str) else item for item in val]
            items = b"".join(part for item in encoded for part in (struct.pack("<Q", len(item)), item))
        assert kind is not None
        head = struct.pack("<I", vtype) if add_vtype else b""
        return head + struct.pack("<IQ", kind, len(val)) + items


def aligned(size: int) -> int:
    """Bytes up to the next multiple of the alignment."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _padded(data: bytes) -> bytes:
    return data + bytes(aligned(len(data)) - len(data))
