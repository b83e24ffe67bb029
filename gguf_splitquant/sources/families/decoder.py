"""Decoders with attention: sizes, rotary embedding and keys that most families share."""

from __future__ import annotations

from typing import ClassVar

import gguf

from ...errors import CheckpointError, UnsupportedModelError
from ..checkpoint import Checkpoint
from .base import Expected, Family
from .rope import DEFAULT_THETA, KINDS, Rope


class Decoder(Family):
    """A family with multi-head attention; fields as transformers names them since Llama.

    Args:
        checkpoint: see :class:`.base.Family`.

    Raises:
        CheckpointError: config.json lacks a field or contradicts itself.
        UnsupportedModelError: a variant that llama.cpp does not compute.
    """

    # transformers' default for fields that older checkpoints leave out
    default_context: ClassVar[int]
    default_heads: ClassVar[int | None] = None
    default_kv_heads: ClassVar[int | None] = None  # None: as many as query heads
    default_theta: ClassVar[float] = DEFAULT_THETA
    rope_kinds: ClassVar[tuple[str, ...]] = KINDS
    default_eps: ClassVar[float] = 1e-6
    default_head_dim: ClassVar[int | None] = None  # None: the width divided by the heads
    # transformers fills head_dim in, so that llama.cpp's converter always writes it
    head_dim_by_default: ClassVar[bool] = True
    activations: ClassVar[tuple[str, ...]] = ("silu", "swish")
    # experts per layer and per token; None in a dense model
    n_experts: int | None = None
    n_experts_used: int | None = None

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_ff = config.integer("intermediate_size")
        self.n_heads = config.integer("num_attention_heads", default=self.default_heads)
        self.n_kv_heads = config.integer("num_key_value_heads", default=self.default_kv_heads or self.n_heads)
        shared = max(1, self.n_embd // self.n_heads)
        self.head_dim = config.integer("head_dim", default=self.default_head_dim or shared)
        self.context = config.integer("max_position_embeddings", default=self.default_context)
        self.rope = self.read_rope()
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                config.path,
                f"num_attention_heads {self.n_heads} is not a multiple of "
                f"num_key_value_heads {self.n_kv_heads}",
                "download the checkpoint's own config.json",
            )
        if self.head_dim == shared and self.n_embd % self.n_heads:
            raise CheckpointError(
                config.path,
                f"hidden_size {self.n_embd} is not a multiple of num_attention_heads {self.n_heads}",
                "download the checkpoint's own config.json",
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                config.path, f"head_dim {self.head_dim} is odd: rotary embeddings need pairs", ""
            )

    def read_rope(self) -> Rope:
        """The rotary embedding of config.json."""
        return Rope.of(self.config, self.context, kinds=self.rope_kinds, default_theta=self.default_theta)

    def check_activation(self) -> None:
        """Raise UnsupportedModelError for an activation that is not in llama.cpp's graph."""
        for field in ("hidden_act", "hidden_activation"):
            self.only(field, *self.activations, why=f"llama.cpp computes {self.activations[0]} here")

    def add_theta_if_unusual(self, writer: gguf.GGUFWriter) -> None:
        """Add the rotary base of a family for which llama.cpp's converter leaves it out.

        Without the key llama.cpp takes 10,000; a model with another base would be computed wrongly.
        """
        if self.rope.theta != DEFAULT_THETA:
            writer.add_rope_freq_base(self.rope.theta)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """Add the architecture's keys (``TextModel.set_gguf_parameters`` in llama.cpp)."""
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        self.add_rope(writer)
        writer.add_layer_norm_rms_eps(self.config.number("rms_norm_eps", default=self.default_eps))
        if self.n_experts is not None and self.n_experts_used is not None:
            writer.add_expert_count(self.n_experts)
            writer.add_expert_used_count(self.n_experts_used)
        self.add_head_lengths(writer)

    def add_rope(self, writer: gguf.GGUFWriter) -> None:
        """Add the rotary embedding's keys."""
        self.rope.add_to(writer)

    def add_head_lengths(self, writer: gguf.GGUFWriter) -> None:
        """Add the head size, where llama.cpp's converter does."""
        if self.head_dim_by_default or self.config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)


def decoder_layout(
    family: Decoder,
    *,
    qkv_bias: bool | None = None,
    output_bias: bool | None = None,
    mlp_bias: bool | None = None,
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm"),
    mlp: bool = True,
) -> dict[str, Expected]:
    """The tensors of a Llama-like decoder: grouped-query attention, gated FFN.

    Args:
        family: gives the sizes.
        qkv_bias: query, key and value projections have to have biases (True), may (False: llama.cpp loads a
            bias wherever there is one, and config.json may be silent about it), or have none (None).
        output_bias: the same for the attention's output projection.
        mlp_bias: the same for the FFN's three.
        norms: of each layer, over the model's width.
        mlp: False where something else takes the FFN's place.
    """
    n_embd, n_ff = family.n_embd, family.n_ff
    n_q, n_kv = family.n_heads * family.head_dim, family.n_kv_heads * family.head_dim
    projections = [
        ("self_attn.q_proj", n_q, n_embd, qkv_bias),
        ("self_attn.k_proj", n_kv, n_embd, qkv_bias),
        ("self_attn.v_proj", n_kv, n_embd, qkv_bias),
        ("self_attn.o_proj", n_embd, n_q, output_bias),
    ]
    if mlp:
        projections += [
            ("mlp.gate_proj", n_ff, n_embd, mlp_bias),
            ("mlp.up_proj", n_ff, n_embd, mlp_bias),
            ("mlp.down_proj", n_embd, n_ff, mlp_bias),
        ]
    layout = {
        "model.embed_tokens.weight": Expected((family.n_vocab, n_embd)),
        "model.norm.weight": Expected((n_embd,)),
        family.head: Expected((family.n_vocab, n_embd), required=not family.tied),
    }
    for layer in range(family.n_layers):
        prefix = f"model.layers.{layer}"
        for name in norms:
            layout[f"{prefix}.{name}.weight"] = Expected((n_embd,))
        for name, rows, columns, bias in projections:
            layout[f"{prefix}.{name}.weight"] = Expected((rows, columns))
            if bias is not None:
                layout[f"{prefix}.{name}.bias"] = Expected((rows,), required=bias)
    return layout


def head_norms(family: Decoder, query: int, key: int) -> dict[str, Expected]:
    """Norms of queries and keys (``q_norm``, ``k_norm``) over that many values each."""
    layout = {}
    for layer in range(family.n_layers):
        prefix = f"model.layers.{layer}.self_attn"
        layout[f"{prefix}.q_norm.weight"] = Expected((query,))
        layout[f"{prefix}.k_norm.weight"] = Expected((key,))
    return layout
