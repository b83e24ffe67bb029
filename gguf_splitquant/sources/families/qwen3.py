"""Qwen3: Qwen2 without biases, with norms of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from .base import Expected
from .decoder import decoder_layout, head_norms
from .qwen2 import Qwen2


class Qwen3(Qwen2):
    """Qwen3ForCausalLM."""

    arch = gguf.MODEL_ARCH.QWEN3
    default_head_dim = 128
    head_dim_by_default = True

    def layout(self) -> Mapping[str, Expected]:
        """One norm for all heads of a layer."""
        self.check_activation()
        self.only("attention_bias", False, why="llama.cpp has no biases here")
        return {**decoder_layout(self), **head_norms(self, self.head_dim, self.head_dim)}
