"""Random models of real architectures, a few kilobytes each, written as GGUF files with gguf-py alone.

They check the engine's arithmetic and its refusals, so nothing here uses the package's own writer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quants

N_VOCAB = 96
N_EMBD = 64
N_HEAD = 4
N_FF = 128
N_EXPERT = 4


@dataclass(frozen=True)
class TinyModel:
    """Weights in F32 by GGUF name, and the architecture's hyperparameters."""

    arch: str
    hparams: Mapping[str, int | float]
    tensors: Mapping[str, np.ndarray]


def _weight(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)


def _norm(rng: np.random.Generator, size: int) -> np.ndarray:
    return (1 + 0.1 * rng.normal(size=size)).astype(np.float32)


def _common(n_layer: int, **more: int | float) -> dict[str, int | float]:
    return {
        "block_count": n_layer,
        "context_length": 128,
        "embedding_length": N_EMBD,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "vocab_size": N_VOCAB,
        **more,
    }


def llama(
    *, n_layer: int = 2, tied: bool = False, experts: bool = False, n_ff: int = N_FF, seed: int = 0
) -> TinyModel:
    """Llama with grouped queries; with ``experts`` Mixtral's layout."""
    rng = np.random.default_rng(seed)
    n_kv = N_EMBD // 2
    tensors = {"token_embd.weight": rng.normal(size=(N_VOCAB, N_EMBD)).astype(np.float32)}
    tensors["output_norm.weight"] = _norm(rng, N_EMBD)
    if not tied:
        tensors["output.weight"] = _weight(rng, N_VOCAB, N_EMBD)
    for i in range(n_layer):
        block = {
            "attn_norm": _norm(rng, N_EMBD),
            "attn_q": _weight(rng, N_EMBD, N_EMBD),
            "attn_k": _weight(rng, n_kv, N_EMBD),
            "attn_v": _weight(rng, n_kv, N_EMBD),
            "attn_output": _weight(rng, N_EMBD, N_EMBD),
            "ffn_norm": _norm(rng, N_EMBD),
        }
        if experts:
            block["ffn_gate_inp"] = _weight(rng, N_EXPERT, N_EMBD)
            block["ffn_gate_exps"] = _weight(rng, N_EXPERT, N_FF, N_EMBD)
            block["ffn_up_exps"] = _weight(rng, N_EXPERT, N_FF, N_EMBD)
            block["ffn_down_exps"] = _weight(rng, N_EXPERT, N_EMBD, N_FF)
        else:
            block["ffn_gate"] = _weight(rng, n_ff, N_EMBD)
            block["ffn_up"] = _weight(rng, n_ff, N_EMBD)
            block["ffn_down"] = _weight(rng, N_EMBD, n_ff)
        tensors |= {f"blk.{i}.{name}.weight": value for name, value in block.items()}
    hparams = _common(n_layer, **{"attention.head_count_kv": N_HEAD // 2, "rope.dimension_count": 16})
    hparams["feed_forward_length"] = n_ff
    if experts:
        hparams |= {"expert_count": N_EXPERT, "expert_used_count": 2}
    return TinyModel("llama", hparams, tensors)


def plm() -> TinyModel:
    """PLM: its graph multiplies the attention weights by itself, past llama.cpp's summing function."""
    rng = np.random.default_rng(7)
    rope, nope, rank, head_v = 8, 16, 32, 16
    tensors = {
        "token_embd.weight": rng.normal(size=(N_VOCAB, N_EMBD)).astype(np.float32),
        "output_norm.weight": _norm(rng, N_EMBD),
        "blk.0.attn_norm.weight": _norm(rng, N_EMBD),
        "blk.0.attn_q.weight": _weight(rng, N_HEAD * (nope + rope), N_EMBD),
        "blk.0.attn_kv_a_mqa.weight": _weight(rng, rank + rope, N_EMBD),
        "blk.0.attn_kv_a_norm.weight": _norm(rng, rank),
        "blk.0.attn_kv_b.weight": _weight(rng, N_HEAD * (nope + head_v), rank),
        "blk.0.attn_output.weight": _weight(rng, N_EMBD, N_HEAD * head_v),
        "blk.0.ffn_norm.weight": _norm(rng, N_EMBD),
        "blk.0.ffn_up.weight": _weight(rng, N_FF, N_EMBD),
        "blk.0.ffn_down.weight": _weight(rng, N_EMBD, N_FF),
    }
    more = {
        "attention.head_count_kv": N_HEAD,
        "attention.key_length": nope + rope,
        "attention.value_length": head_v,
        "attention.kv_lora_rank": rank,
        "rope.dimension_count": rope,
    }
    return TinyModel("plm", _common(1, **more), tensors)


def sublayer_name(name: str, index: int) -> str:
    """``blk.0.attn_q.weight`` -> ``blk.0.attn_q.split1.weight``; index 0 keeps the name."""
    return name if index == 0 else f"{name.removesuffix('.weight')}.split{index}.weight"


def value_split(weight: np.ndarray, k: int) -> list[np.ndarray]:
    """``k`` sub-layers by quantiles of the values, zeros elsewhere: their sum is the weight, bit for bit."""
    edges = np.quantile(weight, np.arange(1, k) / k)
    cluster = np.searchsorted(edges, weight)
    return [np.where(cluster == i, weight, np.float32(0)) for i in range(k)]


def is_linear(name: str) -> bool:
    return name.startswith("blk.") and "norm" not in name


def split(model: TinyModel, names: Sequence[str], k: int = 3) -> TinyModel:
    """The same model with the named weights stored as ``k`` sub-layers."""
    tensors: dict[str, np.ndarray] = {}
    for name, weight in model.tensors.items():
        parts = value_split(weight, k) if name in names else [weight]
        tensors |= {sublayer_name(name, i): part for i, part in enumerate(parts)}
    return replace(model, tensors=tensors)


def quantize(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The bytes of ``values`` in type ``kind``: gguf-py's, and a plain IQ4_NL, which gguf-py only reads."""
    if kind != GGMLQuantizationType.IQ4_NL:
        return np.asarray(quants.quantize(values, kind))
    blocks = values.reshape(-1, 32)
    levels = np.array(quants.IQ4_NL.kvalues, np.float32)
    scale = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    steps = blocks / np.maximum(scale.astype(np.float32), np.float32(1e-8))
    codes = np.abs(steps[:, :, None] - levels).argmin(axis=2).astype(np.uint8)
    packed = np.hstack([scale.view(np.uint8), codes[:, :16] | codes[:, 16:] << 4])
    return packed.reshape(*values.shape[:-1], -1)


_PLAIN = {"float32": "F32", "int32": "I32", "uint8": "I8"}


def write(
    model: TinyModel,
    path: Path,
    types: Mapping[str, GGMLQuantizationType] | None = None,
    metadata: Mapping[str, list[str] | list[int] | str] | None = None,
) -> Path:
    """A GGUF file without tokenizer; ``types`` gives tensors another type than that of their values.
    ``metadata`` is added as it is."""
    writer = GGUFWriter(path, model.arch)
    writer.add_string("tokenizer.ggml.model", "no_vocab")
    for key, value in model.hparams.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.arch}.{key}", value)
    if any(".split1." in name for name in model.tensors):
        writer.add_uint32("splitquant.version", 1)
    for key, content in (metadata or {}).items():
        if isinstance(content, str):
            writer.add_string(key, content)
        else:
            writer.add_array(key, content)
    for name, values in model.tensors.items():
        plain = GGMLQuantizationType[_PLAIN[values.dtype.name]]
        kind = (types or {}).get(name, plain)
        data = values if kind == plain else quantize(values, kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
