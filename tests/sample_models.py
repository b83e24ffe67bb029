"""Small models built in memory, for tests of structure and arithmetic (never of quality)."""

from __future__ import annotations

import numpy as np
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.sources.model import FloatType, SourceModel, SourceTensor


def raw_of(values: np.ndarray, dtype: FloatType) -> np.ndarray:
    """Float32 values as a checkpoint of ``dtype`` stores them (BF16 truncated)."""
    if dtype is FloatType.BF16:
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(dtype.raw_dtype)


def tensor_of(name: str, values: np.ndarray, dtype: FloatType = FloatType.BF16) -> SourceTensor:
    raw = raw_of(np.ascontiguousarray(values, np.float32), dtype)
    return SourceTensor(name, raw.shape, dtype, lambda start, stop: raw[start:stop], origin="memory")


def heavy_tailed(*shape: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_t(4, shape) * 0.02).astype(np.float32)


def small_model(columns: int = 256, dtype: FloatType = FloatType.BF16) -> SourceModel:
    """Two linear layers, an embedding, an untied head, norms: every role once."""
    tensors = (
        tensor_of("token_embd.weight", heavy_tailed(40, columns, seed=1), dtype),
        tensor_of("blk.0.attn_norm.weight", np.ones(columns, np.float32), dtype),
        tensor_of("blk.0.attn_q.weight", heavy_tailed(64, columns, seed=2), dtype),
        tensor_of("blk.0.attn_q.bias", heavy_tailed(64, seed=3), dtype),
        tensor_of("blk.0.ffn_up.weight", heavy_tailed(96, columns, seed=4), dtype),
        tensor_of("output.weight", heavy_tailed(40, columns, seed=5), dtype),
    )
    metadata = {
        "general.architecture": GGUFValue("llama", GGUFValueType.STRING),
        "general.name": GGUFValue("small", GGUFValueType.STRING),
    }
    return SourceModel("llama", metadata, tensors, tied_head=False)
