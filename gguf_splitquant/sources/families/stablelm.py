"""StableLM (3B, 2 1.6B, 2 12B): layer norms with biases, a quarter of each head rotated."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import gguf

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..tokenizers import add_bpe_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout
from .rope import Rope


class StableLM(Decoder):
    """StableLmForCausalLM."""

    arch = gguf.MODEL_ARCH.STABLELM
    default_context = 4096
    head_needed = True
    # scalings have no keys in what llama.cpp's converter writes for it
    rope_kinds = ("default",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.parallel = self.config.flag("use_parallel_residual", default=False)
        self.head_norms = self.config.flag("qk_layernorm", default=False)

    def read_rope(self) -> Rope:
        """A part of each head is rotated."""
        return Rope.of(self.config, self.context, kinds=self.rope_kinds, default_part=0.25)

    def layout(self) -> Mapping[str, Expected]:
        """One norm per layer where attention and FFN run side by side; optional norms of each head."""
        self.check_activation()
        names = ("input_layernorm",) if self.parallel else ("input_layernorm", "post_attention_layernorm")
        bias = self.config.flag("use_qkv_bias", default=False)
        layout = decoder_layout(self, qkv_bias=bias or None, norms=names)
        layout["model.norm.bias"] = Expected((self.n_embd,))
        for layer in range(self.n_layers):
            for name in names:
                layout[f"model.layers.{layer}.{name}.bias"] = Expected((self.n_embd,))
        # the layout grows with layers times heads: a lie must not cost memory
        if self.head_norms and self.n_layers * self.n_heads > len(self.checkpoint.tensors):
            raise CheckpointError(
                self.config.path,
                f"a norm for each of {self.n_heads} heads in {self.n_layers} layers, but the checkpoint has "
                f"{len(self.checkpoint.tensors)} tensors in all",
                "download config and weights again",
            )
        for parts in (parts for stack in self.stacks() for parts in stack.values()):
            layout |= dict.fromkeys(parts, Expected((self.head_dim,)))
        return layout

    def stacks(self) -> Iterable[Mapping[str, Sequence[str]]]:
        """Norms of the heads, one behind the other (``StableLMModel._stack_qk_norm``)."""
        if not self.head_norms:
            return ()
        return [
            {f"{prefix}.weight": [f"{prefix}.norms.{head}.weight" for head in range(n_heads)]}
            for layer in range(self.n_layers)
            for prefix, n_heads in (
                (f"model.layers.{layer}.self_attn.q_layernorm", self.n_heads),
                (f"model.layers.{layer}.self_attn.k_layernorm", self.n_kv_heads),
            )
        ]

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``StableLMModel.set_gguf_parameters``."""
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(self.n_layers)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_rope_dimension_count(int(self.rope.part * self.head_dim))
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        writer.add_parallel_residual(self.parallel)
        writer.add_layer_norm_eps(self.config.number("layer_norm_eps", "norm_eps", default=1e-5))
        self.add_theta_if_unusual(writer)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE."""
        add_bpe_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
