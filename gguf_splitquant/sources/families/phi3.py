"""Phi-3, Phi-3.5 and Phi-4: fused projections, long-context factors for each frequency."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import gguf
import numpy as np

from ...errors import CheckpointError
from ..checkpoint import Checkpoint
from ..model import FloatType, SourceTensor
from ..tokenizers import add_phi3_tokenizer
from .base import Expected
from .decoder import Decoder
from .rope import Rope


class Phi3(Decoder):
    """Phi3ForCausalLM."""

    arch = gguf.MODEL_ARCH.PHI3
    default_context = 4096
    default_eps = 1e-5
    # transformers takes the older names for longrope too
    rope_kinds = ("default", "longrope", "su", "yarn")

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.rotated = int(self.rope.part * self.n_embd) // self.n_heads
        settings = self.rope.settings
        field = "original_max_position_embeddings"
        source = settings if settings and settings.get(field) is not None else self.config
        self.original_context = source.integer(field, default=4096)

    def read_rope(self) -> Rope:
        """A part of each head may be rotated."""
        return Rope.of(self.config, self.context, kinds=self.rope_kinds, default_part=1.0)

    def layout(self) -> Mapping[str, Expected]:
        """Query, key and value are one tensor, and so are gate and up projection; llama.cpp keeps them so."""
        self.check_activation()
        self.only("head_dim", self.n_embd // self.n_heads, why="llama.cpp divides the width by the heads")
        n_embd, n_ff = self.n_embd, self.n_ff
        n_qkv = (self.n_heads + 2 * self.n_kv_heads) * self.head_dim
        layout = {
            "model.embed_tokens.weight": Expected((self.n_vocab, n_embd)),
            "model.norm.weight": Expected((n_embd,)),
            self.head: Expected((self.n_vocab, n_embd), required=not self.tied),
        }
        for layer in range(self.n_layers):
            prefix = f"model.layers.{layer}"
            layout[f"{prefix}.input_layernorm.weight"] = Expected((n_embd,))
            layout[f"{prefix}.post_attention_layernorm.weight"] = Expected((n_embd,))
            layout[f"{prefix}.self_attn.qkv_proj.weight"] = Expected((n_qkv, n_embd))
            layout[f"{prefix}.self_attn.o_proj.weight"] = Expected((n_embd, self.n_heads * self.head_dim))
            layout[f"{prefix}.mlp.gate_up_proj.weight"] = Expected((2 * n_ff, n_embd))
            layout[f"{prefix}.mlp.down_proj.weight"] = Expected((n_embd, n_ff))
        return layout

    def extra_tensors(self) -> Iterable[SourceTensor]:
        """By what to divide each frequency beyond the original context, and within it."""
        if self.rope.kind == "default":
            return ()
        return (self._factors("long"), self._factors("short"))

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``Phi3MiniModel.set_gguf_parameters``."""
        if self.rope.kind != "default":
            writer.add_rope_scaling_attn_factors(self._attention_factor())
        writer.add_context_length(self.context)
        writer.add_rope_scaling_orig_ctx_len(self.original_context)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_block_count(self.n_layers)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        writer.add_layer_norm_rms_eps(self.config.number("rms_norm_eps", default=self.default_eps))
        writer.add_rope_dimension_count(self.rotated)
        writer.add_rope_freq_base(self.rope.theta)
        # llama.cpp tells Phi-4 by the absence of a window
        writer.add_sliding_window(self.config.integer("sliding_window", default=0, minimum=0))

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """SentencePiece (Phi-3) or byte-level BPE (Phi-4)."""
        add_phi3_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)

    def _attention_factor(self) -> float:
        """``_compute_longrope_parameters`` in transformers."""
        settings = self.rope.settings or self.config
        if settings.get("attention_factor") is not None:
            return settings.number("attention_factor")
        scale = settings.number("factor", default=self.context / self.original_context)
        return math.sqrt(1 + math.log(scale) / math.log(self.original_context)) if scale > 1 else 1.0

    def _factors(self, which: str) -> SourceTensor:
        settings = self.rope.settings or self.config
        values = settings.get(f"{which}_factor")
        n_values = self.rotated // 2
        numbers = isinstance(values, list) and all(type(value) in (int, float) for value in values)
        if not numbers or len(values) != n_values:
            raise CheckpointError(
                settings.path,
                f"{which}_factor is not a list of {n_values} numbers",
                "download the checkpoint's own config.json",
            )
        factors = np.array(values, np.float32)
        return SourceTensor(
            f"rope_factors_{which}.weight",
            factors.shape,
            FloatType.F32,
            lambda start, stop: factors[start:stop],
            origin=f"config.json: {which}_factor",
            force_f32=True,
        )
