"""Checkpoints written by hand, so that any part of them can be wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
BYTES_PER_VALUE = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "F64": 8, "U8": 1}


def llama_shapes(config: dict[str, Any] = CONFIG) -> dict[str, list[int]]:
    """Names and shapes of a Llama's tensors."""
    n_embd, n_ff = config["hidden_size"], config["intermediate_size"]
    head_dim = n_embd // config["num_attention_heads"]
    n_kv = config["num_key_value_heads"] * head_dim
    shapes = {"model.embed_tokens.weight": [config["vocab_size"], n_embd], "model.norm.weight": [n_embd]}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= {
            f"{prefix}input_layernorm.weight": [n_embd],
            f"{prefix}post_attention_layernorm.weight": [n_embd],
            f"{prefix}self_attn.q_proj.weight": [n_embd, n_embd],
            f"{prefix}self_attn.k_proj.weight": [n_kv, n_embd],
            f"{prefix}self_attn.v_proj.weight": [n_kv, n_embd],
            f"{prefix}self_attn.o_proj.weight": [n_embd, n_embd],
            f"{prefix}mlp.gate_proj.weight": [n_ff, n_embd],
            f"{prefix}mlp.up_proj.weight": [n_ff, n_embd],
            f"{prefix}mlp.down_proj.weight": [n_embd, n_ff],
        }
    return shapes


def header_of(shapes: dict[str, list[int]], dtype: str = "F32") -> dict[str, Any]:
    """A sound header: tensors one behind the other."""
    header: dict[str, Any] = {}
    position = 0
    for name, shape in shapes.items():
        end = position + int(np.prod(shape)) * BYTES_PER_VALUE[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    return header


def write_raw(path: Path, header: bytes, data: bytes, length: int | None = None) -> Path:
    """A safetensors file, byte by byte; ``length`` is what it claims for its header."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def write_safetensors(path: Path, header: dict[str, Any], n_data: int | None = None) -> Path:
    """A file with that header and as much data as it asks for, or ``n_data`` bytes."""
    ends = [entry["data_offsets"][1] for entry in header.values()]
    n_data = max(ends, default=0) if n_data is None else n_data
    data = np.random.default_rng(0).integers(0, 60, n_data, dtype=np.uint8).tobytes()
    return write_raw(path, json.dumps(header).encode(), data)


def write_tokenizer(folder: Path, n_tokens: int = 300) -> None:
    """A tokenizer.json with byte fallback: needs no pre-tokenizer."""
    tokens = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *map(chr, range(0x4E00, 0x5000)),
    ]
    vocab = {token: i for i, token in enumerate(tokens[:n_tokens])}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True, "unk_token": "<unk>"}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": model,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(roles))


def write_checkpoint(folder: Path, dtype: str = "F32", **config: Any) -> Path:
    """A sound, tiny, tied Llama in one file."""
    folder.mkdir(exist_ok=True)
    fields = {**CONFIG, **config}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v is not None}))
    write_safetensors(folder / "model.safetensors", header_of(llama_shapes(), dtype))
    write_tokenizer(folder)
    return folder


def write_shards(folder: Path) -> dict[str, str]:
    """The same in two shards; returns the index's weight map."""
    write_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    shapes = list(llama_shapes().items())
    weight_map = {}
    for number, part in enumerate((shapes[:4], shapes[4:]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        write_safetensors(folder / name, header_of(dict(part)))
        weight_map |= {tensor: name for tensor, _ in part}
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    """model.safetensors.index.json."""
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
