"""What every model family shares: the checkpoint's tensors become GGUF tensors, config fields GGUF keys.

A family says which tensors its architecture has (:meth:`Family.layout`), how the few special ones change on
the way (:meth:`Family.convert`), which keys it adds, and which tokenizers it accepts. Names come from
gguf-py's tensor map, the order from the checkpoint: both as in llama.cpp's converter
(``conversion/base.py``), whose files these have to equal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import gguf

from ...errors import CheckpointError, UnsupportedModelError
from ..checkpoint import Checkpoint
from ..config import ModelConfig
from ..model import ALWAYS_F32, SourceTensor
from ..official import official_command
from ..safetensors import StoredTensor
from ..slabs import stacked

# buffers that old versions of transformers stored along with the weights; nothing is lost without them
_SKIPPED_SUFFIXES = (
    ".rotary_emb.inv_freq",
    ".attention.bias",
    ".attention.masked_bias",
    ".attn.bias",
    ".attn.masked_bias",
)


_MAX_LAYERS = 512
"""``LLAMA_MAX_LAYERS`` (llama.cpp, src/llama-hparams.h)."""
_MAX_VOCABULARY = 1 << 22
"""Sixteen times the largest published one: every row costs a token's text, score and type."""


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
    # names of fields that some architectures call otherwise
    layers_field: ClassVar[str] = "num_hidden_layers"
    width_field: ClassVar[str] = "hidden_size"
    tied_by_default: ClassVar[bool] = False
    # tensor of an untied output head, and whether llama.cpp's loader can do without it
    head: ClassVar[str] = "lm_head.weight"
    head_needed: ClassVar[bool] = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config = self.model_config()
        self.n_layers = config.integer(self.layers_field, maximum=_MAX_LAYERS)
        self.n_embd = config.integer(self.width_field)
        self.n_vocab = config.integer("vocab_size", maximum=_MAX_VOCABULARY)
        self.tied = config.flag("tie_word_embeddings", default=self.tied_by_default)
        # the name map and the layout grow with the layers: a lie must not cost memory
        if self.n_layers > len(checkpoint.tensors):
            raise CheckpointError(
                config.path,
                f"{self.layers_field} is {self.n_layers}, the checkpoint has "
                f"{len(checkpoint.tensors)} tensors in all",
                "download config and weights again",
            )
        if self.tied and self.head_needed and self.head not in checkpoint.tensors:
            raise UnsupportedModelError(
                config.path, "tie_word_embeddings is true: llama.cpp wants a head of its own here", ""
            )
        self._names = gguf.get_tensor_name_map(self.arch, self.n_layers)

    def model_config(self) -> ModelConfig:
        """The fields of the language model in config.json."""
        return self.checkpoint.config

    def only(self, field: str, *values: Any, why: str) -> None:
        """Refuse a field with another value than those that llama.cpp's graph is written for.

        Args:
            field: of config.json; absent is fine.
            values: the ones that are.
            why: what llama.cpp does instead.
        """
        value = self.config.get(field)
        if value is not None and value not in values:
            raise UnsupportedModelError(self.config.path, f"{field} {str(value)[:60]}: {why}", "")

    # --- tensors

    def stored_name(self, name: str) -> str | None:
        """A tensor's name in the layout by its name in the checkpoint; None for one that is left out."""
        return None if name.endswith(_SKIPPED_SUFFIXES) else name

    def layout(self) -> Mapping[str, Expected]:
        """Every tensor of the architecture, by checkpoint name."""
        raise NotImplementedError

    def stacks(self) -> Iterable[Mapping[str, Sequence[str]]]:
        """Tensors that the checkpoint holds in parts: name of the whole -> names of its parts, in order.

        What comes together in one mapping stands together in the file, where the last part would.
        """
        return ()

    def convert(self, name: str, tensor: SourceTensor) -> Iterable[SourceTensor]:
        """One tensor as the file holds it: reordered, cut, transposed; or none, or several.

        Args:
            name: in the checkpoint, or of the whole in :meth:`stacks`.
            tensor: under that name, values as in the checkpoint. Names of results are such names too.
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
        stored = self._stored()
        self._check_complete(layout, stored)
        stacks = list(self.stacks())
        waiting = [{part for parts in stack.values() for part in parts} for stack in stacks]
        stack_of = {part: index for index, parts in enumerate(waiting) for part in parts}
        for name, tensor in stored.items():
            shape = layout[name].shape
            if tensor.shape != shape:
                raise CheckpointError(
                    tensor.origin,
                    f"shape {list(tensor.shape)}, but by config.json it has to be {list(shape)}",
                    "download config and weights again",
                )
        # sized by config.json, which the shapes have confirmed by now
        yield from self.extra_tensors()
        for name, tensor in stored.items():
            index = stack_of.get(name)
            if index is None:
                yield from self._converted(name, _source(name, tensor))
                continue
            waiting[index].discard(name)
            if not waiting[index]:
                for whole, parts in stacks[index].items():
                    yield from self._converted(
                        whole, stacked(whole, [_source(part, stored[part]) for part in parts])
                    )

    def _stored(self) -> dict[str, StoredTensor]:
        """The checkpoint's tensors by their names in the layout."""
        stored: dict[str, StoredTensor] = {}
        for name, tensor in self.checkpoint.tensors.items():
            known_as = self.stored_name(name)
            if known_as in stored:
                raise CheckpointError(
                    tensor.origin,
                    f"is the same as {stored[known_as].name}",
                    "download the weights again",
                )
            if known_as is not None:
                stored[known_as] = tensor
        return stored

    def _converted(self, name: str, tensor: SourceTensor) -> Iterator[SourceTensor]:
        """Under GGUF names."""
        for made in self.convert(name, tensor):
            gguf_name = self.gguf_name(made.name)
            force_f32 = made.force_f32 or gguf_name.endswith(ALWAYS_F32)
            yield replace(made, name=gguf_name, force_f32=force_f32)

    def gguf_name(self, name: str) -> str:
        """GGUF name of a tensor of the layout, or of what is made from it."""
        mapped: str | None = self._names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise LookupError(f"{name} has no GGUF name in architecture {self.arch.name}")
        return mapped

    def _check_complete(self, layout: Mapping[str, Expected], stored: Mapping[str, StoredTensor]) -> None:
        folder = self.checkpoint.folder
        missing = [name for name, expected in layout.items() if expected.required and name not in stored]
        if missing:
            head = missing == [self.head] and not self.head_needed
            raise CheckpointError(
                folder,
                f"tensor {missing[0]} is missing" + (f", {len(missing)} in all" if len(missing) > 1 else ""),
                "download the weights again"
                + (", or set tie_word_embeddings to true if the head is the embedding" if head else ""),
            )
        unknown = sorted(stored.keys() - layout.keys())
        if unknown:
            raise CheckpointError(
                stored[unknown[0]].origin,
                f"not a tensor of {self.checkpoint.architecture} with {self.n_layers} layers"
                + (f", nor are {len(unknown) - 1} more" if len(unknown) > 1 else ""),
                f"check {self.layers_field} and architectures in config.json, "
                f"or let llama.cpp's converter read it: {official_command(folder)}",
            )

    # --- metadata

    def add_parameters(self, writer: gguf.GGUFWriter) -> None:
        """Add the architecture's keys (``set_gguf_parameters`` in llama.cpp)."""
        raise NotImplementedError

    def add_tokenizer(self, writer: gguf.GGUFWriter, pre_tokenizer: str | None) -> None:
        """Add the tokenizer's keys; ``pre_tokenizer`` overrides the one found."""
        raise NotImplementedError


def _source(name: str, tensor: StoredTensor) -> SourceTensor:
    return SourceTensor(name, tensor.shape, tensor.float_type, tensor.read_rows, origin=tensor.origin)
