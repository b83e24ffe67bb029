"""Gemma 2 and Gemma 3 (text): norms stored minus one, norms behind each block too, sliding windows.

Of a Gemma 3 with vision the language model is read; the vision tower is a file of its own to llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import gguf
import numpy as np

from ...errors import UnsupportedModelError
from ..config import ModelConfig
from ..model import SourceTensor
from ..slabs import elementwise
from ..tokenizers import add_gemma_tokenizer
from .base import Expected
from .decoder import Decoder, decoder_layout, head_norms
from .rope import Rope

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
_ONE = np.float32(1)


class _Gemma(Decoder):
    tied_by_default = True
    default_heads = 8
    default_kv_heads = 4
    default_head_dim = 256
    activations = ("gelu_pytorch_tanh",)
    # layers of the model with another attention scale, and every how many layers attention is global
    large_layers: ClassVar[int]
    period: ClassVar[int]

    def layout(self) -> Mapping[str, Expected]:
        """Four norms per layer."""
        self.check_activation()
        self.only("attention_bias", False, why="llama.cpp has no biases here")
        self.only("use_bidirectional_attention", False, why="llama.cpp's attention is causal here")
        large = self.n_layers == self.large_layers
        scale = self.n_embd // self.n_heads if large else self.head_dim
        if self.config.number("query_pre_attn_scalar", default=256) != scale:
            raise UnsupportedModelError(
                self.config.path, f"query_pre_attn_scalar is not {scale}, which llama.cpp scales by here", ""
            )
        return decoder_layout(self, norms=_NORMS)

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Transformers adds one to a norm's weight when it runs, llama.cpp does not."""
        if name.endswith("norm.weight"):
            return (elementwise(tensor, lambda values: values + _ONE),)
        return (tensor,)

    def check_layer_types(self, period: int) -> None:
        """Refuse other windows than llama.cpp's: every ``period``-th layer sees all."""
        expected = [
            "full_attention" if (layer + 1) % period == 0 else "sliding_attention"
            for layer in range(self.n_layers)
        ]
        why = f"llama.cpp has full attention in every layer whose number {period} divides, nowhere else"
        self.only("layer_types", expected, why=why)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """SentencePiece."""
        add_gemma_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)


class Gemma2(_Gemma):
    """Gemma2ForCausalLM: attention scores and logits capped."""

    arch = gguf.MODEL_ARCH.GEMMA2
    default_context = 8192
    large_layers = 46
    period = 2
    rope_kinds = ("default",)

    def layout(self) -> Mapping[str, Expected]:
        """llama.cpp takes the embedding for the head, whatever is there."""
        if not self.tied:
            raise UnsupportedModelError(
                self.config.path, "tie_word_embeddings is false: llama.cpp ties them here", ""
            )
        self.check_layer_types(self.period)
        return super().layout()

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """Without a copy of the head that some tools leave."""
        return () if name == self.head else super().convert(name, tensor)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``Gemma2Model.set_gguf_parameters``."""
        config = self.config
        for field in ("attn_logit_softcapping", "final_logit_softcapping"):
            if field in config.fields and config.get(field) is None:
                raise UnsupportedModelError(config.path, f"{field} is null: llama.cpp caps here", "")
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_block_count(self.n_layers)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", default=self.default_eps))
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_attn_logit_softcapping(config.number("attn_logit_softcapping", default=50.0))
        writer.add_final_logit_softcapping(config.number("final_logit_softcapping", default=30.0))
        writer.add_sliding_window(config.integer("sliding_window", default=4096))
        self.add_theta_if_unusual(writer)


class Gemma3(_Gemma):
    """Gemma3ForCausalLM: norms of queries and keys, another rotary base within windows."""

    arch = gguf.MODEL_ARCH.GEMMA3
    default_context = 131072
    large_layers = 62
    period = 6
    rope_kinds = ("default", "linear", "yarn")

    def read_rope(self) -> Rope:
        """Of the layers that see all; the other base is :attr:`local_theta`."""
        config = self.config
        both = config.section("rope_parameters")
        local = both.section("sliding_attention") if both else None
        local = local or config
        self.local_theta = local.number(
            "rope_theta" if local is not config else "rope_local_base_freq", default=1e4
        )
        return Rope.of(
            config,
            self.context,
            kinds=self.rope_kinds,
            default_theta=1e6,
            settings=both.section("full_attention") if both else None,
        )

    def add_rope(self, writer: gguf.GGUFWriter) -> None:
        """With the base within windows."""
        super().add_rope(writer)
        writer.add_rope_freq_base_swa(self.local_theta)

    def layout(self) -> Mapping[str, Expected]:
        """Norms over each head."""
        self.only("attn_logit_softcapping", why="llama.cpp does not cap attention scores here")
        if not self._all_global():
            self.only("sliding_window_pattern", self.period, why=f"llama.cpp has {self.period} here")
            self.check_layer_types(self.period)
        return {**super().layout(), **head_norms(self, self.head_dim, self.head_dim)}

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``Gemma3Model.set_gguf_parameters``."""
        super().add_parameters(writer)
        if self.config.get("final_logit_softcapping"):
            writer.add_final_logit_softcapping(self.config.number("final_logit_softcapping"))
        if not self._all_global():
            writer.add_sliding_window(self.config.integer("sliding_window", default=4096))

    def _all_global(self) -> bool:
        types = self.config.get("layer_types")
        if isinstance(types, list):
            return all(kind == "full_attention" for kind in types)
        return bool(self.config.get("sliding_window_pattern") == 1)


class Gemma3WithVision(Gemma3):
    """Gemma3ForConditionalGeneration: its language model."""

    def model_config(self) -> ModelConfig:
        """The fields of ``text_config``."""
        config = self.checkpoint.config
        text = config.section("text_config")
        return ModelConfig(
            {**config.fields, "vocab_size": 262208, **(text.fields if text else {})}, config.path
        )

    def stored_name(self, name: str) -> str | None:
        """Without the vision tower."""
        if name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
            return None
        return super().stored_name(name.replace("language_model.", "", 1))
