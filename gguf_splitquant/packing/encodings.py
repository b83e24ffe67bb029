"""How linear codes are carried by stock ggml block types, so that every llama.cpp kernel runs them.

========  ===============  ==========  =======  ============================================================
codes     carrier          columns     bpw      how ``s * (q - z)`` is written
========  ===============  ==========  =======  ============================================================
INT8      Q8_0             32          8.5      d = s
INT4      Q4_K             256         4.5      d = s, all 6-bit scales 1; dmin = s, all 6-bit minima z
INT4      Q4_1             32          5.0      d = s, m = -s * z: exact in f16 because s keeps 7 bits
INT2      Q2_K             256         2.625    d = s, all 4-bit scales 1; dmin = s, all 4-bit minima z
INT2      Q4_1             32          5.0      as INT4 in Q4_1, with codes 0 to 3
========  ===============  ==========  =======  ============================================================

Formats: ``block_q8_0``, ``block_q4_1``, ``block_q4_K``, ``block_q2_K`` in llama.cpp's ggml-common.h;
decoding: ``dequantize_row_*`` in ggml-quants.c. The 256-wide carriers are smaller and keep all of an f16
scale, so they are used where the row allows; with block granularity INT4 needs a scale per 32 columns,
which only Q4_1 has, and an INT2 block is a Q2_K super-block of 256 (32 in Q4_1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..recipe import Granularity
from .linear import LinearGrid

_Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class LinearEncoding:
    """One way to carry linear codes. Subclasses pack; instances are the rows of the table above.

    Attributes:
        bits: width of the codes.
        scale_bits: significant bits that a two-sided group's scale may have.
        lanes: codes per byte of the carrier.
        run: columns between the codes of one byte.
        first_code: place of the first code byte in a block.
    """

    bits: int
    scale_bits: int
    qtype: ClassVar[GGMLQuantizationType]
    lanes: ClassVar[int]
    run: ClassVar[int]
    first_code: ClassVar[int]

    @property
    def block_columns(self) -> int:
        """Columns per block; rows must be a multiple of it."""
        return int(GGML_QUANT_SIZES[self.qtype][0])

    @property
    def block_bytes(self) -> int:
        """Bytes per block."""
        return int(GGML_QUANT_SIZES[self.qtype][1])

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row of ``columns`` values."""
        return columns // self.block_columns * self.block_bytes

    def pack(self, codes: NDArray[Any], grid: LinearGrid, table: NDArray[Any] | None = None) -> _Bytes:
        """Pack codes.

        Args:
            codes: ``(rows, columns)``, columns a multiple of :attr:`block_columns`: 8-bit, or unsigned
                indices into ``table``.
            grid: one entry per block, shape broadcastable to ``(rows, blocks)``.
            table: 8-bit codes; None: ``codes`` are the codes themselves.

        Returns:
            uint8 ``(rows, row_bytes)``.

        Raises:
            ValueError: the columns do not fill whole blocks.
        """
        # numba takes its time, and planning needs only sizes
        from .kernels import pack_codes

        rows, columns = codes.shape
        if columns % self.block_columns:
            raise ValueError(
                f"{columns} columns are not whole {self.qtype.name} blocks of {self.block_columns}"
            )
        blocks = columns // self.block_columns
        scale = np.broadcast_to(grid.scale, (rows, blocks)).astype("<f2")
        zero = np.broadcast_to(grid.zero, (rows, blocks)).astype(np.uint8)
        out = np.empty((rows, blocks, self.block_bytes), np.uint8)
        self._pack_scales(scale, zero, out)
        if table is None:
            codes, table = codes.view(np.uint8), np.arange(256, dtype=np.uint8)
        groups = self.block_columns // (self.lanes * self.run)
        first = self.first_code
        pack_codes(
            np.ascontiguousarray(codes).reshape(rows * blocks, groups, self.lanes, self.run),
            table.view(np.uint8),
            out.reshape(rows * blocks, -1)[:, first : first + groups * self.run].reshape(
                rows * blocks, groups, self.run
            ),
        )
        return out.reshape(rows, blocks * self.block_bytes)

    def _pack_scales(self, scale: NDArray[np.float16], zero: _Bytes, out: _Bytes) -> None:
        """Write all but the codes; scale and zero ``(rows, blocks)``, out ``(rows, blocks, block_bytes)``."""
        raise NotImplementedError


def _as_bytes(halves: NDArray[np.float16]) -> _Bytes:
    """The two bytes of each f16, as a new last axis."""
    return halves[..., np.newaxis].view(np.uint8)


class _Q8_0(LinearEncoding):
    qtype = GGMLQuantizationType.Q8_0
    lanes, run, first_code = 1, 32, 2

    def _pack_scales(self, scale: NDArray[np.float16], zero: _Bytes, out: _Bytes) -> None:
        out[..., :2] = _as_bytes(scale)


class _Q4_1(LinearEncoding):
    qtype = GGMLQuantizationType.Q4_1
    lanes, run, first_code = 2, 16, 4

    def _pack_scales(self, scale: NDArray[np.float16], zero: _Bytes, out: _Bytes) -> None:
        offset = -scale.astype(np.float32) * zero
        out[..., :2] = _as_bytes(scale)
        out[..., 2:4] = _as_bytes(offset.astype("<f2"))


class _Q4_K(LinearEncoding):
    qtype = GGMLQuantizationType.Q4_K
    lanes, run, first_code = 2, 32, 16

    def _pack_scales(self, scale: NDArray[np.float16], zero: _Bytes, out: _Bytes) -> None:
        out[..., :2] = _as_bytes(scale)
        out[..., 2:4] = _as_bytes(scale)
        # twelve bytes hold eight 6-bit scales and minima; values below 16 need no high bits
        out[..., 4:8] = 1
        out[..., 8:12] = zero[..., np.newaxis]
        out[..., 12:16] = (zero << np.uint8(4) | np.uint8(1))[..., np.newaxis]


class _Q2_K(LinearEncoding):
    qtype = GGMLQuantizationType.Q2_K
    lanes, run, first_code = 4, 32, 16

    def _pack_scales(self, scale: NDArray[np.float16], zero: _Bytes, out: _Bytes) -> None:
        out[..., :16] = (zero << np.uint8(4) | np.uint8(1))[..., np.newaxis]
        out[..., 80:82] = _as_bytes(scale)
        out[..., 82:84] = _as_bytes(scale)


ENCODINGS: tuple[LinearEncoding, ...] = (
    _Q8_0(bits=8, scale_bits=11),
    _Q4_K(bits=4, scale_bits=11),
    _Q4_1(bits=4, scale_bits=7),
    _Q2_K(bits=2, scale_bits=11),
    # two bits of zero point leave nine for the scale
    _Q4_1(bits=2, scale_bits=9),
)
"""All encodings, smallest first for each width."""


def choose_encoding(bits: int, columns: int, granularity: Granularity) -> LinearEncoding | None:
    """The smallest encoding that a row of ``columns`` values allows, or None if there is none."""
    for encoding in ENCODINGS:
        if encoding.bits != bits or columns % encoding.block_columns:
            continue
        if granularity == "block" and encoding.qtype is GGMLQuantizationType.Q4_K:
            continue
        return encoding
    return None
