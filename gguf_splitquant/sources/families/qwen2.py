"""Qwen2 and Qwen2.5: a Llama-like decoder with query, key and value biases and unpermuted heads."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from ..tokenizers import add_qwen2_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout


class Qwen2(Decoder):
    """Qwen2ForCausalLM."""

    arch = gguf.MODEL_ARCH.QWEN2
    default_context = 32768
    default_kv_heads = 32
    head_dim_by_default = False

    def layout(self) -> Mapping[str, Expected]:
        """Biases on query, key and value only."""
        self.check_activation()
        return decoder_layout(self, qkv_bias=True)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE, or SentencePiece where there is a tokenizer.model."""
        add_qwen2_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
