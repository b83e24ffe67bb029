"""Qwen2-MoE (Qwen1.5-MoE, Qwen2-57B-A14B) and Qwen3-MoE: their dense siblings with experts in every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import gguf

from ...errors import UnsupportedModelError
from ..checkpoint import Checkpoint
from ..model import SourceTensor
from ..slabs import part_of_each
from ..tokenizers import add_bpe_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout, head_norms
from .experts import SeparateExperts, read_expert_counts

_PREFIX = "model.layers.{layer}.mlp"
_FUSED = ".mlp.experts.gate_up_proj"


class _QwenMoe(Decoder):
    default_context = 32768
    default_kv_heads = 4
    head_dim_by_default = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        read_expert_counts(self)
        self.n_ff_expert = self.config.integer("moe_intermediate_size")
        # some checkpoints hold the experts of a layer as one tensor, as transformers does in memory
        self.fused = any(name.endswith(_FUSED) for name in checkpoint.tensors)

    def layout(self) -> Mapping[str, Expected]:
        """Experts, their router; the attention is the subclass's."""
        self.check_activation()
        why = "llama.cpp has experts in every layer here"
        self.only("decoder_sparse_step", 1, why=why)
        self.only("mlp_only_layers", [], why=why)
        n_embd, n_ff, n_experts = self.n_embd, self.n_ff_expert, self.n_experts or 0
        layout: dict[str, Expected] = {}
        for layer in range(self.n_layers):
            prefix = _PREFIX.format(layer=layer)
            layout[f"{prefix}.gate.weight"] = Expected((n_experts, n_embd))
            if self.fused:
                layout[f"{prefix}.experts.gate_up_proj"] = Expected((n_experts, 2 * n_ff, n_embd))
                layout[f"{prefix}.experts.down_proj"] = Expected((n_experts, n_embd, n_ff))
        return layout if self.fused else {**layout, **self._experts().layout()}

    def stacks(self) -> Iterable[Mapping[str, Sequence[str]]]:
        """As ``Qwen2MoeModel.modify_tensors``."""
        return () if self.fused else self._experts().stacks()

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Gate and up projections, where they are one tensor, are two."""
        if name.endswith(_FUSED):
            prefix, n_ff = name.removesuffix(".gate_up_proj"), self.n_ff_expert
            return (
                part_of_each(f"{prefix}.gate_proj.weight", tensor, 0, n_ff),
                part_of_each(f"{prefix}.up_proj.weight", tensor, n_ff, 2 * n_ff),
            )
        if name.endswith(".mlp.experts.down_proj"):
            return (replace(tensor, name=f"{name}.weight"),)
        return (tensor,)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``Qwen2MoeModel.set_gguf_parameters``."""
        super().add_parameters(writer)
        writer.add_expert_feed_forward_length(self.n_ff_expert)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE."""
        add_bpe_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)

    def _experts(self) -> SeparateExperts:
        up, down = (self.n_ff_expert, self.n_embd), (self.n_embd, self.n_ff_expert)
        shapes = {"down_proj": down, "gate_proj": up, "up_proj": up}
        return SeparateExperts(self, f"{_PREFIX}.experts", shapes)


class Qwen2Moe(_QwenMoe):
    """Qwen2MoeForCausalLM: a shared expert beside the chosen ones."""

    arch = gguf.MODEL_ARCH.QWEN2MOE
    default_kv_heads = 16
    head_needed = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_ff_shared = self.config.integer("shared_expert_intermediate_size")

    def layout(self) -> Mapping[str, Expected]:
        """With the shared expert, and biases on query, key and value."""
        self.only("norm_topk_prob", False, why="llama.cpp does not rescale the experts' weights here")
        self.only("qkv_bias", True, why="llama.cpp wants these biases")
        layout = {**decoder_layout(self, qkv_bias=True, mlp=False), **super().layout()}
        n_embd, n_ff = self.n_embd, self.n_ff_shared
        for layer in range(self.n_layers):
            prefix = _PREFIX.format(layer=layer)
            layout[f"{prefix}.shared_expert_gate.weight"] = Expected((1, n_embd))
            layout[f"{prefix}.shared_expert.gate_proj.weight"] = Expected((n_ff, n_embd))
            layout[f"{prefix}.shared_expert.up_proj.weight"] = Expected((n_ff, n_embd))
            layout[f"{prefix}.shared_expert.down_proj.weight"] = Expected((n_embd, n_ff))
        return layout

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``Qwen2MoeModel.set_gguf_parameters``."""
        super().add_parameters(writer)
        writer.add_expert_shared_feed_forward_length(self.n_ff_shared)


class Qwen3Moe(_QwenMoe):
    """Qwen3MoeForCausalLM: norms of queries and keys, no biases, no shared expert."""

    arch = gguf.MODEL_ARCH.QWEN3MOE

    def layout(self) -> Mapping[str, Expected]:
        """With the norms of Qwen3."""
        self.only("attention_bias", False, why="llama.cpp has no biases here")
        # absent means false to transformers
        if self.config.get("norm_topk_prob") is not True:
            raise UnsupportedModelError(
                self.config.path,
                "norm_topk_prob is not true: llama.cpp rescales the experts' weights here",
                "check it against the model's own config.json: it is true in the published ones",
            )
        norms = head_norms(self, self.head_dim, self.head_dim)
        return {**decoder_layout(self, mlp=False), **norms, **super().layout()}
