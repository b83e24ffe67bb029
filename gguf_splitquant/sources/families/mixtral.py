"""Mixtral: Mistral with experts in place of the FFN, under llama.cpp's Llama architecture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ..checkpoint import Checkpoint
from .base import Expected
from .decoder import decoder_layout
from .experts import SeparateExperts, read_expert_counts
from .llama import Mistral

_PREFIX = "model.layers.{layer}.block_sparse_moe"


class Mixtral(Mistral):
    """MixtralForCausalLM."""

    head_dim_by_default = False
    default_theta = 1e6
    default_eps = 1e-5

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        read_expert_counts(self)

    def layout(self) -> Mapping[str, Expected]:
        """A router and experts per layer."""
        self.check_activation()
        layout = decoder_layout(self, mlp=False)
        for layer in range(self.n_layers):
            layout[f"{_PREFIX.format(layer=layer)}.gate.weight"] = Expected(
                (self.n_experts or 0, self.n_embd)
            )
        return {**layout, **self._experts().layout()}

    def stacks(self) -> Iterable[Mapping[str, Sequence[str]]]:
        """As ``LlamaModel.modify_tensors``."""
        return self._experts().stacks("layers.{layer}.feed_forward.experts")

    def _experts(self) -> SeparateExperts:
        up, down = (self.n_ff, self.n_embd), (self.n_embd, self.n_ff)
        return SeparateExperts(self, f"{_PREFIX}.experts", {"w1": up, "w2": down, "w3": up})
