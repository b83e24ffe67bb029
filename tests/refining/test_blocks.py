"""Packed blocks decode, in gguf-py and in ggml's own layout, to exactly scale * level + offset."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType, dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.refining.blocks import Blocks, BlockType, block_type, refinable


def random_blocks(kind: type[BlockType], seed: int, count: int = 5) -> Blocks:
    """Blocks that use every field over its whole range."""
    rng = np.random.default_rng(seed)
    subs = kind.block // kind.sub
    codes = rng.integers(0, len(kind.levels), (count, kind.block)).astype(np.uint8)
    unit = rng.uniform(-2, 2, count).astype(np.float16).astype(np.float32)
    offset_unit = rng.uniform(0, 2, count).astype(np.float16).astype(np.float32)
    if kind.scale_steps is None:
        scale = rng.uniform(-2, 2, (count, subs)).astype(np.float16).astype(np.float32)
        offset = rng.uniform(-2, 2, (count, subs)).astype(np.float16).astype(np.float32) * kind.affine
        return Blocks(codes, scale, offset, np.zeros(count, np.float32), np.zeros(count, np.float32))
    low, high = kind.scale_steps
    steps = rng.integers(low, high + 1, (count, subs)).astype(np.float32)
    falls = rng.integers(0, kind.offset_steps + 1, (count, subs)).astype(np.float32)
    return Blocks(codes, steps * unit[:, None], -falls * offset_unit[:, None], unit, offset_unit)


@pytest.mark.parametrize("qtype", refinable(), ids=lambda t: t.name)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_gguf_py_decodes_what_was_packed(qtype: GGMLQuantizationType, seed: int) -> None:
    kind = block_type(qtype)
    blocks = random_blocks(kind, seed)
    packed = kind.pack(blocks)
    assert packed.dtype == np.uint8 and packed.shape == (len(blocks.codes), kind.type_size)
    level = np.array(kind.levels, np.float32)[blocks.codes]
    wide = [np.repeat(v, kind.sub, axis=1) for v in (blocks.scale, blocks.offset)]
    np.testing.assert_array_equal(dequantize(packed, qtype), wide[0] * level + wide[1])


def test_unit_zero_packs_zero_scales() -> None:
    kind = block_type(GGMLQuantizationType.Q4_K)
    zero = np.zeros((1, 8), np.float32)
    blocks = Blocks(np.zeros((1, 256), np.uint8), zero, zero, zero[0, :1], zero[0, :1])
    assert not dequantize(kind.pack(blocks), kind.qtype).any()


def test_types_that_are_not_refined_are_named() -> None:
    with pytest.raises(RecipeError, match=r"IQ2_XXS.*Q4_0"):
        block_type(GGMLQuantizationType.IQ2_XXS)
