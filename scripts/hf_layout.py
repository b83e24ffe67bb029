"""Writes Llama-type models that come as GGUF or as llama2.c files in the Hugging Face layout, as float32.

The way back from llama.cpp's converter, for :mod:`scripts.real_models` only: names, the order of rotary pairs
in Q and K, config.json, and the two tokenizers that are needed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, quants
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from gguf_splitquant.errors import CheckpointError

F32 = NDArray[np.float32]
Tensors = dict[str, F32]


# -- tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The dimensions of a Llama-type model."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def rotary_halves(weight: F32, heads: int) -> F32:
    """Rows of Q or K from Meta's order (rotary pairs side by side) to Hugging Face's (half a head apart).

    llama.cpp and llama2.c keep Meta's order; this undoes ``LlamaModel.permute`` of llama.cpp's converter.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def scramble(tensors: Tensors, shape: Shape, rng: np.random.Generator) -> Tensors:
    """The same function with its channels in random orders: every output is a sum of the same products.

    One order for the residual stream everywhere, one per layer for FFN neurons, one per KV head for the V/O
    dimensions. Rotary embeddings pin the order inside Q and K heads.

    Args:
        tensors: a Llama-type model in Hugging Face names and layout.
        shape: its dimensions.
        rng: source of the orders.
    """
    stream = rng.permutation(shape.width)
    group = shape.heads // shape.kv_heads
    out: Tensors = {}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        out[name] = tensors[name][..., stream]
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        neurons = rng.permutation(shape.ffn)
        inside = [rng.permutation(shape.head_dim) for _ in range(shape.kv_heads)]
        v_rows = np.concatenate([head * shape.head_dim + order for head, order in enumerate(inside)])
        o_columns = np.concatenate([h * shape.head_dim + inside[h // group] for h in range(shape.heads)])
        for norm in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            out[prefix + norm] = tensors[prefix + norm][stream]
        for name, rows, columns in (
            ("self_attn.q_proj.weight", slice(None), stream),
            ("self_attn.k_proj.weight", slice(None), stream),
            ("self_attn.v_proj.weight", v_rows, stream),
            ("self_attn.o_proj.weight", stream, o_columns),
            ("mlp.gate_proj.weight", neurons, stream),
            ("mlp.up_proj.weight", neurons, stream),
            ("mlp.down_proj.weight", stream, neurons),
        ):
            out[prefix + name] = tensors[prefix + name][rows][:, columns]
    return {name: np.ascontiguousarray(out[name]) for name in tensors}


# -- SmolLM2 ---------------------------------------------------------------------------------------------

_FROM_GGUF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def write_llama_gguf(reader: GGUFReader, out: Path, rng: np.random.Generator | None) -> None:
    """Write a GGUF of architecture ``llama`` with a SmolLM tokenizer to ``out`` as an F32 HF checkpoint.

    Args:
        reader: the file; quantized tensors are dequantized.
        out: an empty folder.
        rng: scramble channels with it; None keeps their order.
    """
    meta = {key: field.contents() for key, field in reader.fields.items()}
    shape = Shape(
        layers=meta["llama.block_count"],
        width=meta["llama.embedding_length"],
        ffn=meta["llama.feed_forward_length"],
        heads=meta["llama.attention.head_count"],
        kv_heads=meta["llama.attention.head_count_kv"],
    )
    tensors = gguf_tensors(reader, shape)
    if rng is not None:
        tensors = scramble(tensors, shape, rng)
    token_ids = {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }
    _write_checkpoint(
        out,
        tensors,
        shape,
        context=meta["llama.context_length"],
        vocabulary=meta["llama.vocab_size"],
        rope_theta=meta["llama.rope.freq_base"],
        # the shortest decimal that reads back as the same float32: 1e-05, as the original config has it
        epsilon=float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"]))),
        token_ids=token_ids,
    )
    _write_smollm_tokenizer(out, meta)
    languages = "".join(f"- {language}\n" for language in meta["general.languages"])
    front = f"license: {meta['general.license']}\nlanguage:\n{languages}"
    (out / "README.md").write_text(f"---\n{front}---\n\nDequantized from a GGUF file.\n", encoding="utf-8")


def gguf_tensors(reader: GGUFReader, shape: Shape) -> Tensors:
    """All tensors as float32, in Hugging Face names and layout."""
    tensors: Tensors = {}
    for tensor in reader.tensors:
        data = np.asarray(quants.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name = "model.norm.weight"
        else:
            _, layer, kind, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{_FROM_GGUF[kind]}.weight"
            if kind in ("attn_q", "attn_k"):
                data = rotary_halves(data, shape.heads if kind == "attn_q" else shape.kv_heads)
        tensors[name] = np.ascontiguousarray(data)
    return tensors


def _write_smollm_tokenizer(out: Path, meta: dict[str, Any]) -> None:
    tokens: list[str] = meta["tokenizer.ggml.tokens"]
    control = 3  # LLAMA_TOKEN_TYPE_CONTROL
    added = [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for index, kind in enumerate(meta["tokenizer.ggml.token_type"])
        if kind == control
    ]
    # llama.cpp's `smollm` pre-tokenizer is this pair: single digits, then GPT-2's expression
    pre_tokenizer = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        ],
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": meta["tokenizer.ggml.merges"],
        },
    }
    bos, eos, pad, unknown = (
        tokens[meta[f"tokenizer.ggml.{kind}_token_id"]] for kind in ("bos", "eos", "padding", "unknown")
    )
    config = {
        "add_prefix_space": meta["tokenizer.ggml.add_space_prefix"],
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in added
        },
        "additional_special_tokens": [bos, eos],
        "bos_token": bos,
        "chat_template": meta["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": meta["llama.context_length"],
        "pad_token": pad,
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": unknown,
    }
    _write_json(out / "tokenizer.json", tokenizer)
    _write_json(out / "tokenizer_config.json", config)


# -- stories15M ------------------------------------------------------------------------------------------


def write_llama2c(model: bytes, tokenizer: bytes, out: Path) -> None:
    """Write a llama2.c version-0 checkpoint (``export.py legacy_export``, ``run.c``) as an F32 HF checkpoint.

    Args:
        model: seven int32 (width, FFN width, layers, heads, KV heads, vocabulary, context), then float32.
        tokenizer: llama2.c's tokenizer.bin of the same vocabulary.
        out: an empty folder.
    """
    width, ffn, layers, heads, kv_heads, vocabulary, context = (
        int(n) for n in np.frombuffer(model, "<i4", 7)
    )
    if vocabulary < 0:
        raise CheckpointError("model.bin", "its head is untied, which this script does not read")
    shape = Shape(layers, width, ffn, heads, kv_heads)
    kv_width = kv_heads * shape.head_dim
    values = np.frombuffer(model, "<f4", offset=28)
    position = 0

    def take(*dimensions: int) -> F32:
        nonlocal position
        start, position = position, position + int(np.prod(dimensions))
        return values[start:position].reshape(dimensions)

    embedding = take(vocabulary, width)
    stacked = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": take(layers, width, width),
        "self_attn.k_proj": take(layers, kv_width, width),
        "self_attn.v_proj": take(layers, kv_width, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, ffn, width),
        "mlp.down_proj": take(layers, width, ffn),
        "mlp.up_proj": take(layers, ffn, width),
    }
    norm = take(width)
    rotary_tables = context * shape.head_dim
    if values.size != position + rotary_tables:
        raise CheckpointError(
            "model.bin", f"it has {values.size} values, expected {position + rotary_tables}"
        )

    tensors: Tensors = {"model.embed_tokens.weight": embedding}
    for layer in range(layers):
        for kind, data in stacked.items():
            weight = data[layer]
            if kind.endswith(("q_proj", "k_proj")):
                weight = rotary_halves(weight, heads if kind.endswith("q_proj") else kv_heads)
            tensors[f"model.layers.{layer}.{kind}.weight"] = np.ascontiguousarray(weight)
    tensors["model.norm.weight"] = norm
    _write_checkpoint(
        out,
        tensors,
        shape,
        context=context,
        vocabulary=vocabulary,
        rope_theta=10000.0,
        epsilon=1e-5,
        token_ids={"bos_token_id": 1, "eos_token_id": 2},
    )
    (out / "tokenizer.model").write_bytes(llama2_sentencepiece(tokenizer, vocabulary))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "legacy": True,
        "model_max_length": context,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    _write_json(out / "tokenizer_config.json", config)


def llama2_sentencepiece(table: bytes, vocabulary: int) -> bytes:
    """Llama 2's SentencePiece model from llama2.c's tokenizer.bin.

    ``table`` is the longest piece's length (int32), then score (float32), length (int32) and UTF-8 bytes of
    each piece, with spaces for SentencePiece's U+2581 and the bytes 3..258 already decoded (to the code
    point of that number, which is why ids, not contents, tell them apart here).
    """
    proto = sentencepiece_proto.ModelProto()
    kinds = sentencepiece_proto.ModelProto.SentencePiece
    position = 4
    for index in range(vocabulary):
        score = float(np.frombuffer(table, "<f4", 1, position)[0])
        length = int(np.frombuffer(table, "<i4", 1, position + 4)[0])
        text = table[position + 8 : position + 8 + length].decode("utf-8")
        position += 8 + length
        kind = kinds.NORMAL
        if index == 0:
            kind = kinds.UNKNOWN
        elif index < 3:
            text, kind = text.strip("\n"), kinds.CONTROL
        elif index < 3 + 256:
            text, kind = f"<0x{index - 3:02X}>", kinds.BYTE
        proto.pieces.add(piece=text.replace(" ", "\u2581"), score=score, type=kind)
    if position != len(table):
        raise CheckpointError("tokenizer.bin", f"{len(table) - position} bytes follow the last piece")
    proto.trainer_spec.model_type = sentencepiece_proto.TrainerSpec.BPE
    proto.trainer_spec.vocab_size = vocabulary
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.split_digits = True
    proto.trainer_spec.unk_id, proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 0, 1, 2
    proto.trainer_spec.pad_id = -1
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = True
    return bytes(proto.SerializeToString(deterministic=True))


# -- what both share -------------------------------------------------------------------------------------


def _write_checkpoint(
    out: Path,
    tensors: Tensors,
    shape: Shape,
    *,
    context: int,
    vocabulary: int,
    rope_theta: float,
    epsilon: float,
    token_ids: dict[str, int],
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        **token_ids,
        "hidden_act": "silu",
        "hidden_size": shape.width,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": context,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": epsilon,
        "rope_scaling": None,
        "rope_theta": rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": vocabulary,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {"_from_model_config": True, **token_ids})
    weights = out / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    # safetensors makes it private to its owner, unlike the files beside it
    weights.chmod((out / "config.json").stat().st_mode)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
