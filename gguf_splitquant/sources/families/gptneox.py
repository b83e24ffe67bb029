"""GPT-NeoX and Pythia: attention and FFN side by side, query, key and value interleaved by head."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import gguf
import numpy as np

from ..model import SourceTensor
from ..slabs import reordered
from ..tokenizers import add_bpe_tokenizer
from .base import Expected
from .decoder import Decoder
from .rope import Rope


class GPTNeoX(Decoder):
    """GPTNeoXForCausalLM."""

    arch = gguf.MODEL_ARCH.GPTNEOX
    default_context = 2048
    head = "embed_out.weight"
    head_needed = True
    # llama.cpp computes the usual approximation of gelu
    activations = ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh")
    # scalings have no keys in what llama.cpp's converter writes for it
    rope_kinds = ("default",)

    def read_rope(self) -> Rope:
        """A part of each head is rotated."""
        return Rope.of(self.config, self.context, kinds=self.rope_kinds, default_part=0.25)

    def layout(self) -> Mapping[str, Expected]:
        """Biases everywhere but in embedding and head."""
        self.check_activation()
        self.only("attention_bias", True, why="llama.cpp wants these biases")
        n_embd, n_ff = self.n_embd, self.n_ff
        layout = {
            "gpt_neox.embed_in.weight": Expected((self.n_vocab, n_embd)),
            "gpt_neox.final_layer_norm.weight": Expected((n_embd,)),
            "gpt_neox.final_layer_norm.bias": Expected((n_embd,)),
            self.head: Expected((self.n_vocab, n_embd), required=not self.tied),
        }
        for layer in range(self.n_layers):
            prefix = f"gpt_neox.layers.{layer}"
            for name in ("input_layernorm", "post_attention_layernorm"):
                layout[f"{prefix}.{name}.weight"] = Expected((n_embd,))
                layout[f"{prefix}.{name}.bias"] = Expected((n_embd,))
            for name, rows, columns in (
                ("attention.query_key_value", 3 * n_embd, n_embd),
                ("attention.dense", n_embd, n_embd),
                ("mlp.dense_h_to_4h", n_ff, n_embd),
                ("mlp.dense_4h_to_h", n_embd, n_ff),
            ):
                layout[f"{prefix}.{name}.weight"] = Expected((rows, columns))
                layout[f"{prefix}.{name}.bias"] = Expected((rows,))
        return layout

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """All queries, then all keys, then all values (``GPTNeoXModel.modify_tensors``)."""
        if ".query_key_value." in name:
            by_head = np.arange(tensor.shape[0]).reshape(self.n_heads, 3, self.head_dim)
            return (reordered(tensor, by_head.swapaxes(0, 1).reshape(-1)),)
        return (tensor,)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``GPTNeoXModel.set_gguf_parameters``."""
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(self.n_layers)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_rope_dimension_count(int(self.rope.part * self.head_dim))
        writer.add_head_count(self.n_heads)
        writer.add_parallel_residual(self.config.flag("use_parallel_residual", default=True))
        writer.add_layer_norm_eps(self.config.number("layer_norm_eps", default=1e-5))
        self.add_theta_if_unusual(writer)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE."""
        add_bpe_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)
