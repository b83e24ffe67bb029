"""Checkpoints with the shapes of real models and synthetic weights: right for time and memory, meaningless
for quality.

All are Llama checkpoints in BF16, with the tokenizer of a small real model. A sparse one has values where
they count, in its first layers and at the top of the vocabulary's tables, and holes (zeros) elsewhere: 28 GB
take 1 GB of disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scripts.real_models import stories15m

_COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
}


def _shape(
    hidden: int, inner: int, layers: int, heads: int, head_dim: int, vocabulary: int, tied: bool
) -> dict[str, Any]:
    return {
        **_COMMON,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "1B": _shape(2048, 8192, 16, 32, 64, 128256, tied=True),
    "4B": _shape(2560, 9728, 36, 32, 128, 151936, tied=True),
    "14B": _shape(5120, 17408, 40, 40, 128, 151936, tied=False),
}
"""config.json of each: the sizes of Llama 3.2 1B, Qwen3 4B and Qwen3 14B."""

_ROWS = 4096
_VALUES = 1 << 20


def write_checkpoint(
    folder: Path, size: str = "1B", layers: int | None = None, filled: int | None = None
) -> None:
    """Write a checkpoint of normally distributed weights, and gains of norms that differ by channel.

    With such gains every layer matters to the output and some of its channels do more than others, so that
    a plan has something to choose.

    Args:
        folder: to be made.
        size: a key of :data:`SHAPES`.
        layers: of the model; None: as many as the real one.
        filled: layers that hold values, and then only the first 4,096 rows of embedding and head do; the
            others are holes. None: everything holds values.
    """
    config = dict(SHAPES[size])
    config["num_hidden_layers"] = layers = layers or config["num_hidden_layers"]
    shapes = _tensors(config)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = stories15m()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    header, position = {}, 0
    for name, shape in shapes.items():
        size_bytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size_bytes]}
        position += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + position)
        for name, shape in shapes.items():
            file.seek(start + header[name]["data_offsets"][0])
            wanted = _filled_rows(name, shape[0], filled)
            # little at a time: the peak of a process counts what its parent held when it began
            step = max(1, _VALUES // int(np.prod(shape[1:])))
            for first in range(0, wanted, step):
                rows = (min(step, wanted - first), *shape[1:])
                weights = rng.standard_normal(rows, np.float32)
                weights = weights * np.float32(0.02) if len(shape) > 1 else np.exp(weights / 2)
                file.write((weights.view(np.uint32) >> 16).astype("<u2").tobytes())


def _filled_rows(name: str, rows: int, filled: int | None) -> int:
    if filled is None or (len(name.split(".")) > 3 and int(name.split(".")[2]) < filled):
        return rows
    return min(rows, _ROWS) if "layers" not in name else 0


def _tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries = config["num_attention_heads"] * config["head_dim"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.mlp.down_proj.weight": (hidden, inner),
            f"{layer}.mlp.gate_proj.weight": (inner, hidden),
            f"{layer}.mlp.up_proj.weight": (inner, hidden),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
        }
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes
