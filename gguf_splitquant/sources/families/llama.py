"""Llama 1 to 3.x, TinyLlama, SmolLM2, and Mistral, which shares everything but two defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from ..model import FloatType, SourceTensor
from ..tokenizers import add_llama_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout
from .rope import KINDS


def interleave_heads(tensor: SourceTensor, n_heads: int) -> SourceTensor:
    """Rows of a query or key projection, from transformers' order to the original one that llama.cpp rotates.

    Transformers stores the first halves of all rotated pairs of a head, then the second halves; the original
    weights hold each pair side by side. A slab reads the heads that it touches and no others.

    Args:
        tensor: ``(n_heads * head_dim, columns)``, or ``(n_heads * head_dim,)`` for a bias.
        n_heads: heads of this projection; ``head_dim`` has to be even.
    """
    head_dim = tensor.shape[0] // n_heads
    within = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        first_head = start // head_dim
        end_head = -(-stop // head_dim)
        rows = np.arange(start, stop)
        source = rows // head_dim * head_dim + within[rows % head_dim] - first_head * head_dim
        heads = tensor.read_rows(first_head * head_dim, max(first_head, end_head) * head_dim)
        gathered: NDArray[Any] = heads[source]
        return gathered

    return replace(tensor, read_rows=read_rows)


class Llama(Decoder):
    """LlamaForCausalLM."""

    arch = gguf.MODEL_ARCH.LLAMA
    default_context = 2048
    rope_kinds: ClassVar[tuple[str, ...]] = (*KINDS, "llama3")

    def layout(self) -> Mapping[str, Expected]:
        """Biases where ``attention_bias`` and ``mlp_bias`` say so."""
        self.check_activation()
        attention_bias = self.config.flag("attention_bias", default=False)
        return decoder_layout(
            self,
            qkv_bias=attention_bias,
            output_bias=attention_bias,
            mlp_bias=self.config.flag("mlp_bias", default=False),
        )

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Query and key rows in the order that llama.cpp rotates (``LlamaModel.permute``)."""
        if ".self_attn.q_proj." in name:
            return (interleave_heads(tensor, self.n_heads),)
        if ".self_attn.k_proj." in name:
            return (interleave_heads(tensor, self.n_kv_heads),)
        return (tensor,)

    def extra_tensors(self) -> Iterable[SourceTensor]:
        """Llama 3's frequency factors."""
        factors = self.rope.llama3_factors(self.head_dim)
        if factors is None:
            return ()
        return (
            SourceTensor(
                "rope_freqs.weight",
                factors.shape,
                FloatType.F32,
                lambda start, stop: factors[start:stop],
                origin="config.json: rope scaling",
                force_f32=True,
            ),
        )

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``LlamaModel.set_gguf_parameters``."""
        super().add_parameters(writer)
        writer.add_vocab_size(self.n_vocab)
        writer.add_rope_dimension_count(self.head_dim)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """SentencePiece, its tokenizer.json form, or byte-level BPE (Llama 3)."""
        add_llama_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)


class Mistral(Llama):
    """MistralForCausalLM."""

    default_context = 131072
    default_kv_heads = 8
