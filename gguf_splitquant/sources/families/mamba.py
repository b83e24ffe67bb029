"""Mamba and Falcon-Mamba: state space layers with a short convolution, no attention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import ClassVar

import gguf
import numpy as np
from numpy.typing import NDArray

from ...errors import UnsupportedModelError
from ..checkpoint import Checkpoint
from ..model import SourceTensor
from ..slabs import elementwise, squeezed
from ..tokenizers import add_mamba_tokenizer
from .base import Expected, Family

# a state space model has no end of context: what llama.cpp's converter says
_CONTEXT = 2**20


class Mamba(Family):
    """MambaForCausalLM."""

    arch = gguf.MODEL_ARCH.MAMBA
    tied_by_default = True
    # Falcon-Mamba normalizes the step and the input and output projections of the state
    inner_norms: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config = self.config
        self.n_inner = config.integer("intermediate_size", default=2 * self.n_embd)
        self.n_state = config.integer("state_size", default=16)
        self.kernel = config.integer("conv_kernel", default=4)
        rank = config.get("time_step_rank")
        self.rank = -(-self.n_embd // 16) if rank in (None, "auto") else config.integer("time_step_rank")
        if self.n_inner != 2 * self.n_embd:
            raise UnsupportedModelError(
                config.path,
                f"intermediate_size {self.n_inner} is not twice hidden_size, as llama.cpp wants",
                "",
            )

    def layout(self) -> Mapping[str, Expected]:
        """The tensors of every mixer."""
        self.only("hidden_act", "silu", "swish", why="llama.cpp computes silu here")
        self.only("use_bias", False, why="llama.cpp has no biases here")
        self.only("use_conv_bias", True, why="llama.cpp wants this bias")
        n_embd, n_inner = self.n_embd, self.n_inner
        layout = {
            "backbone.embeddings.weight": Expected((self.n_vocab, n_embd)),
            "backbone.norm_f.weight": Expected((n_embd,)),
            self.head: Expected((self.n_vocab, n_embd), required=not self.tied),
        }
        for layer in range(self.n_layers):
            prefix = f"backbone.layers.{layer}"
            layout[f"{prefix}.norm.weight"] = Expected((n_embd,))
            for name, shape in (
                ("A_log", (n_inner, self.n_state)),
                ("D", (n_inner,)),
                ("conv1d.weight", (n_inner, 1, self.kernel)),
                ("conv1d.bias", (n_inner,)),
                ("in_proj.weight", (2 * n_inner, n_embd)),
                ("x_proj.weight", (self.rank + 2 * self.n_state, n_inner)),
                ("dt_proj.weight", (n_inner, self.rank)),
                ("dt_proj.bias", (n_inner,)),
                ("out_proj.weight", (n_embd, n_inner)),
            ):
                layout[f"{prefix}.mixer.{name}"] = Expected(shape)
        return layout

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """A instead of its logarithm; the convolution without its axis of one; no copy of a tied head."""
        if name == self.head and self.tied:
            return ()
        if name.endswith(".A_log"):
            return (elementwise(tensor, _negative_exponential),)
        if name.endswith(".conv1d.weight"):
            return (squeezed(tensor),)
        return (tensor,)

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """As ``MambaModel.set_gguf_parameters``."""
        writer.add_context_length(_CONTEXT)
        writer.add_embedding_length(self.n_embd)
        # unused, but the loader wants them
        writer.add_feed_forward_length(0)
        writer.add_head_count(0)
        writer.add_block_count(self.n_layers)
        writer.add_ssm_conv_kernel(self.kernel)
        writer.add_ssm_inner_size(self.n_inner)
        writer.add_ssm_state_size(self.n_state)
        writer.add_ssm_time_step_rank(self.rank)
        writer.add_layer_norm_rms_eps(self.config.number("layer_norm_epsilon", "rms_norm_eps", default=1e-5))
        writer.add_ssm_dt_b_c_rms(self.inner_norms)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Byte-level BPE, or SentencePiece where there is no tokenizer.json."""
        add_mamba_tokenizer(writer, self.checkpoint.folder, self.n_vocab, pre_tokenizer)


class FalconMamba(Mamba):
    """FalconMambaForCausalLM."""

    inner_norms = True


def _negative_exponential(values: NDArray[np.float32]) -> NDArray[np.float32]:
    # rounded from float64: float32 exponentials differ between libraries and processors in the last bit
    return (-np.exp(values.astype(np.float64))).astype(np.float32)
