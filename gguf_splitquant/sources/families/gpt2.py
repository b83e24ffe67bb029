"""GPT-2: learned positions, layer norms with biases, and weights stored transposed (``Conv1D``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import gguf

from ..checkpoint import Checkpoint
from ..model import SourceTensor
from ..slabs import transposed
from ..tokenizers import add_bpe_tokenizer
from .base import Expected, Family

_PREFIX = "transformer."


class GPT2(Family):
    """GPT2LMHeadModel."""

    arch = gguf.MODEL_ARCH.GPT2
    layers_field = "n_layer"
    width_field = "n_embd"
    tied_by_default = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.n_heads = self.config.integer("n_head")
        self.n_ff = self.config.integer("n_inner", default=4 * self.n_embd)
        self.context = self.config.integer("n_positions", "n_ctx")

    def stored_name(self, name: str) -> str | None:
        """Published checkpoints are of the bare model, without a prefix."""
        stored = super().stored_name(name)
        if stored is None or stored == self.head:
            return stored
        return stored if stored.startswith(_PREFIX) else _PREFIX + stored

    def layout(self) -> Mapping[str, Expected]:
        """Biases everywhere; matrices as ``(inputs, outputs)``."""
        gelu = ("gelu_new", "gelu", "gelu_fast", "gelu_pytorch_tanh")
        self.only("activation_function", *gelu, why="llama.cpp computes gelu here")
        self.only("scale_attn_weights", True, why="llama.cpp scales attention scores")
        why = "llama.cpp scales all layers alike"
        self.only("scale_attn_by_inverse_layer_idx", False, why=why)
        self.only("add_cross_attention", False, why="llama.cpp has no cross-attention here")
        n_embd, n_ff = self.n_embd, self.n_ff
        layout = {
            "transformer.wte.weight": Expected((self.n_vocab, n_embd)),
            "transformer.wpe.weight": Expected((self.context, n_embd)),
            "transformer.ln_f.weight": Expected((n_embd,)),
            "transformer.ln_f.bias": Expected((n_embd,)),
            self.head: Expected((self.n_vocab, n_embd), required=not self.tied),
        }
        for layer in range(self.n_layers):
            prefix = f"transformer.h.{layer}"
            for name in ("ln_1", "ln_2"):
                layout[f"{prefix}.{name}.weight"] = Expected((n_embd,))
                layout[f"{prefix}.{name}.bias"] = Expected((n_embd,))
            for name, inputs, outputs in (
                ("attn.c_attn", n_embd, 3 * n_embd),
                ("attn.c_proj", n_embd, n_embd),
                ("mlp.c_fc", n_embd, n_ff),
                ("mlp.c_proj", n_ff, n_embd),
            ):
                layout[f"{prefix}.{name}.weight"] = Expected((inputs, outputs))
                layout[f"{prefix}.{name}.bias"] = Expected((outputs,))
        return layout

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Matrices as linear layers hold them."""
        if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            return (transposed(tensor),)
        return (tensor,)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``GPT2Model.set_gguf_parameters``."""
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_layer_norm_eps(self.config.number("layer_norm_epsilon", default=1e-5))

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE."""
        add_bpe_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
