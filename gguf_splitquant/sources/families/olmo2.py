"""OLMo 2: norms behind attention and FFN instead of before them, and of all queries and keys together."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from ..tokenizers import add_bpe_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout, head_norms


class Olmo2(Decoder):
    """Olmo2ForCausalLM."""

    arch = gguf.MODEL_ARCH.OLMO2
    default_context = 2048
    default_eps = 1e-5
    head_dim_by_default = False
    head_needed = True

    def layout(self) -> Mapping[str, Expected]:
        """No biases."""
        self.check_activation()
        self.only("attention_bias", False, why="llama.cpp has no biases here")
        norms = head_norms(self, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim)
        names = ("post_attention_layernorm", "post_feedforward_layernorm")
        return {**decoder_layout(self, norms=names), **norms}

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE."""
        add_bpe_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
