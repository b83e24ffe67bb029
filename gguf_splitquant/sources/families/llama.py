"""Llama 1 to 3.x, TinyLlama, SmolLM2, and Mistral, which shares everything but two defaults."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedModelError
from ..model import FloatType, SourceTensor
from ..tokenizers import add_llama_tokenizer
from .base import Expected, Family


def decoder_layout(
    family: Family, *, qkv_bias: bool, output_bias: bool, mlp_bias: bool
) -> dict[str, Expected]:
    """The tensors of a Llama-like decoder: RMSNorm, rotary grouped-query attention, gated FFN.

    Args:
        family: gives the sizes.
        qkv_bias: query, key and value projections have to have biases.
        output_bias: so does the attention's output projection.
        mlp_bias: so do the FFN's three.
    """
    n_embd, n_ff = family.n_embd, family.n_ff
    n_q, n_kv = family.n_heads * family.head_dim, family.n_kv_heads * family.head_dim
    layout = {
        "model.embed_tokens.weight": Expected((family.n_vocab, n_embd)),
        "model.norm.weight": Expected((n_embd,)),
        "lm_head.weight": Expected((family.n_vocab, n_embd), required=not family.tied),
    }
    for layer in range(family.n_layers):
        prefix = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            layout[f"{prefix}.{name}.weight"] = Expected((n_embd,))
        for name, rows, columns, bias in (
            ("self_attn.q_proj", n_q, n_embd, qkv_bias),
            ("self_attn.k_proj", n_kv, n_embd, qkv_bias),
            ("self_attn.v_proj", n_kv, n_embd, qkv_bias),
            ("self_attn.o_proj", n_embd, n_q, output_bias),
            ("mlp.gate_proj", n_ff, n_embd, mlp_bias),
            ("mlp.up_proj", n_ff, n_embd, mlp_bias),
            ("mlp.down_proj", n_embd, n_ff, mlp_bias),
        ):
            layout[f"{prefix}.{name}.weight"] = Expected((rows, columns))
            # llama.cpp loads a bias wherever there is one; config.json may be silent about it
            layout[f"{prefix}.{name}.bias"] = Expected((rows,), required=bias)
    return layout


def check_activation(family: Family) -> None:
    """Raise UnsupportedModelError for an FFN not gated by SiLU, the only one in llama.cpp's graph."""
    activation = family.config.get("hidden_act")
    if activation not in (None, "silu", "swish"):
        raise UnsupportedModelError(
            family.config.path, f"hidden_act {str(activation)[:60]}: llama.cpp computes silu here", ""
        )


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


class Llama(Family):
    """LlamaForCausalLM."""

    arch = gguf.MODEL_ARCH.LLAMA
    default_context = 2048

    def layout(self) -> Mapping[str, Expected]:
        """Biases where ``attention_bias`` and ``mlp_bias`` say so."""
        check_activation(self)
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
