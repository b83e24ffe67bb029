"""What every model family shares: the checkpoint's tensors become GGUF tensors, config fields GGUF keys.

A family says which tensors its architecture has (:meth:`Family.layout`), how the few special ones change on
the way (:meth:`Family.convert`), which keys it adds, and which tokenizers it accepts. Names come from
gguf-py's tensor map, the order from the checkpoint: both as in llama.cpp's converter
(``conversion/base.py``), whose files these have to equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import gguf

from ...errors import CheckpointError, UnsupportedModelError
from ..checkpoint import Checkpoint
from ..model import SourceTensor
from .rope import Rope

# buffers that old versions of transformers stored along with the weights; nothing is lost without them
_SKIPPED_SUFFIXES = (".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias")


@dataclass(frozen=True)
class Expected:
    """A tensor that the architecture has: its shape by the config, and whether it may be absent."""

    shape: tuple[int, ...]
    required: bool = True


class Family:
    """One model family: override what differs.

    Args:
        checkpoint: opened, with an ``architecture`` that the registry maps to this class.

    Raises:
        CheckpointError: config.json lacks a field or contradicts itself.
    """

    arch: ClassVar[gguf.MODEL_ARCH]
    # transformers' default for fields that older checkpoints leave out
    default_context: ClassVar[int]
    default_kv_heads: ClassVar[int | None] = None  # None: as many as query heads
    # transformers fills head_dim in, so that llama.cpp's converter always writes it
    head_dim_by_default: ClassVar[bool] = True

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config = checkpoint.config
        self.n_layers = config.integer("num_hidden_layers")
        self.n_embd = config.integer("hidden_size")
        self.n_ff = config.integer("intermediate_size")
        self.n_heads = config.integer("num_attention_heads")
        self.n_kv_heads = config.integer("num_key_value_heads", default=self.default_kv_heads or self.n_heads)
        self.n_vocab = config.integer("vocab_size")
        self.head_dim = config.integer("head_dim", default=max(1, self.n_embd // self.n_heads))
        self.tied = config.flag("tie_word_embeddings", default=False)
        self.context = config.integer("max_position_embeddings", default=self.default_context)
        self.rope = Rope.of(config, self.context)
        self._check_config()
        self._names = gguf.get_tensor_name_map(self.arch, self.n_layers)

    def _check_config(self) -> None:
        path = self.config.path
        # the name map and the layout grow with the layers: a lie must not cost memory
        if self.n_layers > len(self.checkpoint.tensors):
            raise CheckpointError(
                path,
                f"num_hidden_layers is {self.n_layers}, the checkpoint has "
                f"{len(self.checkpoint.tensors)} tensors in all",
                "download config and weights again",
            )
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                path,
                f"num_attention_heads {self.n_heads} is not a multiple of "
                f"num_key_value_heads {self.n_kv_heads}",
                "download the checkpoint's own config.json",
            )
        if self.config.get("head_dim") is None and self.n_embd % self.n_heads:
            raise CheckpointError(
                path,
                f"hidden_size {self.n_embd} is not a multiple of num_attention_heads {self.n_heads}",
                "download the checkpoint's own config.json",
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(
                path, f"head_dim {self.head_dim} is odd: rotary embeddings need pairs", ""
            )

    # --- tensors

    def layout(self) -> Mapping[str, Expected]:
        """Every tensor of the architecture, by checkpoint name."""
        raise NotImplementedError

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """One checkpoint tensor, already under its GGUF name, as the file holds it: reordered, cut, stacked.

        Args:
            name: in the checkpoint.
            tensor: GGUF name, values as in the checkpoint.
        """
        return (tensor,)

    def extra_tensors(self) -> Iterable[SourceTensor]:
        """Tensors that the checkpoint does not hold; they come first in the file."""
        return ()

    def tensors(self) -> Iterator[SourceTensor]:
        """All tensors, in file order.

        Raises:
            CheckpointError: a tensor is missing, unknown, not a float, or of another shape than config.json
                says.
        """
        layout = self.layout()
        stored = {n: t for n, t in self.checkpoint.tensors.items() if not n.endswith(_SKIPPED_SUFFIXES)}
        self._check_complete(layout, stored.keys())
        yield from self.extra_tensors()
        for name, tensor in stored.items():
            shape = layout[name].shape
            if tensor.shape != shape:
                raise CheckpointError(
                    tensor.origin,
                    f"shape {list(tensor.shape)}, but by config.json it has to be {list(shape)}",
                    "download config and weights again",
                )
            yield from self.convert(
                name,
                SourceTensor(
                    self.gguf_name(name), shape, tensor.float_type, tensor.read_rows, origin=tensor.origin
                ),
            )

    def gguf_name(self, name: str) -> str:
        """GGUF name of a tensor of the layout."""
        mapped: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise LookupError(f"{name} has no GGUF name in architecture {self.arch.name}")
        return mapped

    def _check_complete(self, layout: Mapping[str, Expected], names: Iterable[str]) -> None:
        names = set(names)
        folder = self.checkpoint.folder
        missing = [name for name, expected in layout.items() if expected.required and name not in names]
        if missing:
            head = missing == ["lm_head.weight"]
            raise CheckpointError(
                folder,
                f"tensor {missing[0]} is missing" + (f", {len(missing)} in all" if len(missing) > 1 else ""),
                "download the weights again"
                + (", or set tie_word_embeddings to true if the head is the embedding" if head else ""),
            )
        unknown = sorted(names - layout.keys())
        if unknown:
            raise CheckpointError(
                self.checkpoint.tensors[unknown[0]].origin,
                f"not a tensor of {self.checkpoint.architecture} with {self.n_layers} layers"
                + (f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                "check num_hidden_layers and architectures in config.json, "
                "or convert with llama.cpp's convert_hf_to_gguf.py",
            )

    # --- metadata

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """Add the architecture's keys (``TextModel.set_gguf_parameters`` in llama.cpp)."""
        config = self.config
        writer.add_block_count(self.n_layers)
        writer.add_context_length(self.context)
        writer.add_embedding_length(self.n_embd)
        writer.add_feed_forward_length(self.n_ff)
        writer.add_head_count(self.n_heads)
        writer.add_head_count_kv(self.n_kv_heads)
        self.rope.add_to(writer)
        writer.add_layer_norm_rms_eps(config.number("rms_norm_eps", default=1e-6))
        if self.head_dim_by_default or config.get("head_dim") is not None:
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Add the tokenizer's keys; ``pre_tokenizer`` overrides the one found."""
        raise NotImplementedError
