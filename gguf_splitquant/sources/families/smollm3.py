"""SmolLM3: Llama with every fourth layer unrotated."""

from __future__ import annotations

from collections.abc import Mapping

import gguf

from .base import Expected
from .decoder import decoder_layout
from .llama import Llama
from .rope import KINDS

_STEP = 4


class SmolLM3(Llama):
    """SmolLM3ForCausalLM."""

    arch = gguf.MODEL_ARCH.SMOLLM3
    tied_by_default = True
    default_context = 32768
    default_kv_heads = 4
    default_theta = 2e6
    head_dim_by_default = False
    rope_kinds = KINDS

    def layout(self) -> Mapping[str, Expected]:
        """No biases."""
        self.check_activation()
        self.only("attention_bias", False, why="llama.cpp has no biases here")
        self.only("mlp_bias", False, why="llama.cpp has no biases here")
        self.only("use_sliding_window", False, why="llama.cpp has no windows here")
        why = f"llama.cpp leaves every {_STEP}th layer unrotated, no other"
        self.only(
            "no_rope_layers", [int((layer + 1) % _STEP != 0) for layer in range(self.n_layers)], [], why=why
        )
        if self.config.get("no_rope_layers") in (None, []):
            self.only("no_rope_layer_interval", _STEP, why=why)
        return decoder_layout(self)
