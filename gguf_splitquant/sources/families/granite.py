"""Granite 3, dense and MoE: Llama with four factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import gguf

from ..checkpoint import Checkpoint
from ..model import SourceTensor
from ..slabs import part_of_each, row_range
from .base import Expected
from .decoder import decoder_layout
from .experts import read_expert_counts
from .llama import Llama
from .rope import KINDS

_MOE = "model.layers.{layer}.block_sparse_moe"
_SHARED = "model.layers.{layer}.shared_mlp"


class Granite(Llama):
    """GraniteForCausalLM."""

    arch = gguf.MODEL_ARCH.GRANITE
    rope_kinds = KINDS

    def layout(self) -> Mapping[str, Expected]:
        """As Llama's."""
        self._check_head_dim()
        return super().layout()

    def _check_head_dim(self) -> None:
        why = "llama.cpp divides the width by the heads"
        self.only("head_dim", self.n_embd // self.n_heads, why=why)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``GraniteModel.set_gguf_parameters``."""
        super().add_parameters(writer)
        number = self.config.number
        writer.add_attention_scale(number("attention_multiplier", default=1.0))
        writer.add_embedding_scale(number("embedding_multiplier", default=1.0))
        writer.add_residual_scale(number("residual_multiplier", default=1.0))
        writer.add_logit_scale(number("logits_scaling", default=1.0))

    def add_head_lengths(self, writer: gguf.GGUFWriter) -> None:
        """None: llama.cpp divides the width by the heads."""


class GraniteMoe(Granite):
    """GraniteMoeForCausalLM, and GraniteMoeSharedForCausalLM with a shared expert."""

    arch = gguf.MODEL_ARCH.GRANITE_MOE

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        read_expert_counts(self)
        self.n_ff_shared = self.config.integer("shared_intermediate_size", default=0, minimum=0)

    def layout(self) -> Mapping[str, Expected]:
        """Experts are stacked in the checkpoint, gate and up projection in one stack."""
        self.check_activation()
        self._check_head_dim()
        bias = self.config.flag("attention_bias", default=False)
        layout = decoder_layout(self, qkv_bias=bias, output_bias=bias, mlp=False)
        n_embd, n_ff, n_experts = self.n_embd, self.n_ff, self.n_experts or 0
        for layer in range(self.n_layers):
            prefix = _MOE.format(layer=layer)
            layout[f"{prefix}.router.layer.weight"] = Expected((n_experts, n_embd))
            layout[f"{prefix}.input_linear.weight"] = Expected((n_experts, 2 * n_ff, n_embd))
            layout[f"{prefix}.output_linear.weight"] = Expected((n_experts, n_embd, n_ff))
            if self.n_ff_shared:
                shared = _SHARED.format(layer=layer)
                layout[f"{shared}.input_linear.weight"] = Expected((2 * self.n_ff_shared, n_embd))
                layout[f"{shared}.output_linear.weight"] = Expected((n_embd, self.n_ff_shared))
        return layout

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Gate and up projection apart (``GraniteMoeModel.modify_tensors``)."""
        prefix = name.removesuffix(".input_linear.weight")
        layer = prefix.rpartition(".")[0]
        if name.endswith(".block_sparse_moe.input_linear.weight"):
            return (
                part_of_each(f"{layer}.mlp.experts.gate_proj.weight", tensor, 0, self.n_ff),
                part_of_each(f"{layer}.mlp.experts.up_proj.weight", tensor, self.n_ff, 2 * self.n_ff),
            )
        if name.endswith(".shared_mlp.input_linear.weight"):
            n_ff = self.n_ff_shared
            return (
                row_range(f"{layer}.mlp.shared_expert.gate_proj.weight", tensor, 0, n_ff),
                row_range(f"{layer}.mlp.shared_expert.up_proj.weight", tensor, n_ff, 2 * n_ff),
            )
        return super().convert(name, tensor)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``GraniteMoeModel.set_gguf_parameters``."""
        super().add_parameters(writer)
        if self.n_ff_shared:
            writer.add_expert_shared_feed_forward_length(self.n_ff_shared)
