"""The stock ggml block types that error feedback writes: what their blocks can hold, and their bytes.

One small class per type, registered by its ``GGMLQuantizationType``. The search for scales and indices knows
types only through these attributes; adding a type is one class with a ``pack``. Layouts: ggml-common.h
(``block_q4_0`` ...) and the ``dequantize_row_*`` functions of ggml-quants.c in llama.cpp.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import RecipeError

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]

# kvalues_iq4nl of ggml-common.h: the 16 levels of IQ4_NL and IQ4_XS
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


@dataclass(frozen=True)
class Blocks:
    """Quantized blocks before packing, file order.

    Attributes:
        codes: level indices, uint8 (blocks, block size).
        scale: scale of every sub-block, float32 (blocks, sub-blocks); for super-block types an exact multiple
            of ``unit``.
        offset: what is added to ``scale * level``, same shape; a multiple of ``-offset_unit`` likewise.
        unit: f16-valued float32 (blocks,); 0 where the type has no super-block scale.
        offset_unit: the same for offsets.
    """

    codes: U8
    scale: F32
    offset: F32
    unit: F32
    offset_unit: F32


class BlockType(ABC):
    """A ggml block type. Values are ``scale * level + offset`` (offset 0 unless ``affine``).

    Attributes:
        qtype: the ggml type.
        block: columns per block of the file.
        sub: columns that share one scale.
        levels: representable multiples of the scale, ascending.
        affine: has an offset per sub-block.
        scale_steps: lowest and highest integer scale of a super-block type; None: each scale is an f16.
        offset_steps: highest integer offset of a super-block type.
    """

    qtype: ClassVar[GGMLQuantizationType]
    block: ClassVar[int]
    type_size: ClassVar[int]
    sub: ClassVar[int] = 32
    levels: ClassVar[tuple[int, ...]]
    affine: ClassVar[bool] = False
    scale_steps: ClassVar[tuple[int, int] | None] = None
    offset_steps: ClassVar[int] = 0

    def __init_subclass__(cls, qtype: GGMLQuantizationType, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.qtype = qtype
        cls.block, cls.type_size = GGML_QUANT_SIZES[qtype]
        _REGISTRY[qtype] = cls

    @classmethod
    @abstractmethod
    def pack(cls, blocks: Blocks) -> U8:
        """Bytes of the blocks: uint8 (blocks, type_size)."""

    @classmethod
    def uniform(cls) -> bool:
        """Levels are consecutive integers."""
        return cls.levels == tuple(range(cls.levels[0], cls.levels[-1] + 1))


_REGISTRY: dict[GGMLQuantizationType, type[BlockType]] = {}


def refinable() -> tuple[GGMLQuantizationType, ...]:
    """The types that error feedback can write."""
    return tuple(_REGISTRY)


def block_type(qtype: GGMLQuantizationType) -> type[BlockType]:
    """The description of ``qtype``. Raises RecipeError for a type that is not refined here."""
    try:
        return _REGISTRY[qtype]
    except KeyError:
        known = ", ".join(t.name for t in _REGISTRY)
        raise RecipeError(
            qtype.name, "error feedback does not write this type", f"choose one of {known}"
        ) from None


def _halves(*values: F32) -> U8:
    """f16 fields of a block, in order: (blocks, 2 * fields)."""
    return np.stack([v.astype(np.float16) for v in values], axis=1).view(np.uint8)


def _join(parts: Iterable[NDArray[Any]]) -> U8:
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=1)


def _nibbles(codes: U8, group: int) -> U8:
    """Low nibbles from the first half of each group of columns, high nibbles from the second half."""
    halves = codes.reshape(len(codes), -1, 2, group // 2) & np.uint8(15)
    return (halves[:, :, 0] | (halves[:, :, 1] << np.uint8(4))).reshape(len(codes), -1)


def _fifth_bits(codes: U8) -> U8:
    """Bit 4 of 32 columns as a little-endian 32-bit field."""
    return np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")


def _bit_planes(codes: U8, span: int, width: int) -> U8:
    """``width``-bit fields of columns ``l``, ``l + 32``, ... of each ``span``, low bits of byte l first."""
    lanes = codes.reshape(len(codes), -1, span // 32, 32)
    shifts = (np.arange(span // 32, dtype=np.uint8) * width)[:, None]
    packed: U8 = np.bitwise_or.reduce(lanes << shifts, axis=2)
    return packed.reshape(len(codes), -1)


def _steps(values: F32, unit: F32) -> NDArray[np.int32]:
    """Integer multiples of the super-block unit: (blocks, sub-blocks)."""
    divisor = np.where(unit == 0, np.float32(1), unit)[:, None]
    return np.rint(values / divisor).astype(np.int32)


class _Q4_0(BlockType, qtype=GGMLQuantizationType.Q4_0):
    levels = tuple(range(-8, 8))

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        return _join([_halves(blocks.scale[:, 0]), _nibbles(blocks.codes, 32)])


class _Q4_1(BlockType, qtype=GGMLQuantizationType.Q4_1):
    levels = tuple(range(16))
    affine = True

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        return _join([_halves(blocks.scale[:, 0], blocks.offset[:, 0]), _nibbles(blocks.codes, 32)])


class _Q5_0(BlockType, qtype=GGMLQuantizationType.Q5_0):
    levels = tuple(range(-16, 16))

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        return _join([_halves(blocks.scale[:, 0]), _fifth_bits(blocks.codes), _nibbles(blocks.codes, 32)])


class _Q5_1(BlockType, qtype=GGMLQuantizationType.Q5_1):
    levels = tuple(range(32))
    affine = True

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        head = _halves(blocks.scale[:, 0], blocks.offset[:, 0])
        return _join([head, _fifth_bits(blocks.codes), _nibbles(blocks.codes, 32)])


class _Q8_0(BlockType, qtype=GGMLQuantizationType.Q8_0):
    # -128 is left out as in ggml: kernels that move the sign to the other operand cannot negate it
    levels = tuple(range(-127, 128))

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        return _join([_halves(blocks.scale[:, 0]), blocks.codes - np.uint8(127)])


class _IQ4_NL(BlockType, qtype=GGMLQuantizationType.IQ4_NL):
    levels = IQ4_LEVELS

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        return _join([_halves(blocks.scale[:, 0]), _nibbles(blocks.codes, 32)])


class _IQ4_XS(BlockType, qtype=GGMLQuantizationType.IQ4_XS):
    levels = IQ4_LEVELS
    scale_steps = (-32, 31)

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        steps = (_steps(blocks.scale, blocks.unit) + 32).astype(np.uint16)
        high = np.bitwise_or.reduce((steps >> 4) << (2 * np.arange(8, dtype=np.uint16)), axis=1)
        low = ((steps[:, 0::2] & 15) | ((steps[:, 1::2] & 15) << 4)).astype(np.uint8)
        return _join([_halves(blocks.unit), high.astype("<u2")[:, None], low, _nibbles(blocks.codes, 32)])


class _Q2_K(BlockType, qtype=GGMLQuantizationType.Q2_K):
    sub = 16
    levels = tuple(range(4))
    affine = True
    scale_steps = (0, 15)
    offset_steps = 15

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        scales = _steps(blocks.scale, blocks.unit) | (_steps(-blocks.offset, blocks.offset_unit) << 4)
        tail = _halves(blocks.unit, blocks.offset_unit)
        return _join([scales.astype(np.uint8), _bit_planes(blocks.codes, 128, 2), tail])


class _Q3_K(BlockType, qtype=GGMLQuantizationType.Q3_K):
    sub = 16
    levels = tuple(range(-4, 4))
    scale_steps = (-32, 31)

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        steps = (_steps(blocks.scale, blocks.unit) + 32).astype(np.uint8)
        low = (steps[:, :8] & 15) | ((steps[:, 8:] & 15) << np.uint8(4))
        pairs = (steps >> np.uint8(4)).reshape(-1, 4, 4)  # sub-block 4 i + j: bits 2 i of byte j
        high = np.bitwise_or.reduce(pairs << (2 * np.arange(4, dtype=np.uint8))[:, None], axis=1)
        mask = _bit_planes(blocks.codes >> np.uint8(2), 256, 1)
        planes = _bit_planes(blocks.codes & np.uint8(3), 128, 2)
        return _join([mask, planes, low, high, _halves(blocks.unit)])


def _scales_and_minima(blocks: Blocks) -> U8:
    """The 12 bytes of eight 6-bit scales and eight 6-bit minima (``get_scale_min_k4`` reads them)."""
    scale = _steps(blocks.scale, blocks.unit).astype(np.uint8)
    minimum = _steps(-blocks.offset, blocks.offset_unit).astype(np.uint8)
    top = np.uint8(6), np.uint8(4)
    first = scale[:, :4] | ((scale[:, 4:] >> top[1]) << top[0])
    second = minimum[:, :4] | ((minimum[:, 4:] >> top[1]) << top[0])
    third = (scale[:, 4:] & np.uint8(15)) | ((minimum[:, 4:] & np.uint8(15)) << top[1])
    return np.concatenate([first, second, third], axis=1)


class _Q4_K(BlockType, qtype=GGMLQuantizationType.Q4_K):
    levels = tuple(range(16))
    affine = True
    scale_steps = (0, 63)
    offset_steps = 63

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        head = _halves(blocks.unit, blocks.offset_unit)
        return _join([head, _scales_and_minima(blocks), _nibbles(blocks.codes, 64)])


class _Q5_K(BlockType, qtype=GGMLQuantizationType.Q5_K):
    levels = tuple(range(32))
    affine = True
    scale_steps = (0, 63)
    offset_steps = 63

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        head = _halves(blocks.unit, blocks.offset_unit)
        fifth = _bit_planes(blocks.codes >> np.uint8(4), 256, 1)
        return _join([head, _scales_and_minima(blocks), fifth, _nibbles(blocks.codes, 64)])


class _Q6_K(BlockType, qtype=GGMLQuantizationType.Q6_K):
    sub = 16
    levels = tuple(range(-32, 32))
    scale_steps = (-128, 127)

    @classmethod
    def pack(cls, blocks: Blocks) -> U8:
        steps = _steps(blocks.scale, blocks.unit).astype(np.int8)
        low = _nibbles(blocks.codes, 128)  # columns l and l + 64 of each 128 share a byte
        high = _bit_planes(blocks.codes >> np.uint8(4), 128, 2)
        return _join([low, high, steps, _halves(blocks.unit)])
