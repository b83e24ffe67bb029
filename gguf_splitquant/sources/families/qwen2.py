"""Qwen2 and Qwen2.5: a Llama-like decoder with query, key and value biases and unpermuted heads."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from ..tokenizers import add_qwen2_tokenizer
from .base import Expected, Family
from .llama import check_activation, decoder_layout


class Qwen2(Family):
    """Qwen2ForCausalLM."""

    arch = gguf.MODEL_ARCH.QWEN2
    default_context = 32768
    default_kv_heads = 32
    head_dim_by_default = False

    def layout(self) -> Mapping[str, Expected]:
        """Biases on query, key and value only."""
        check_activation(self)
        layout = decoder_layout(self, qkv_bias=True, output_bias=False, mlp_bias=False)
        other_bias = (".o_proj.bias", ".gate_proj.bias", ".up_proj.bias", ".down_proj.bias")
        return {name: expected for name, expected in layout.items() if not name.endswith(other_bias)}

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE, or SentencePiece where there is a tokenizer.model."""
        add_qwen2_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
