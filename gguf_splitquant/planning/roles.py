"""What a tensor does in the model, read off its GGUF name: the recipe treats the roles differently."""

from __future__ import annotations

import enum

from ..sources.model import ALWAYS_F32, SourceTensor


class Role(str, enum.Enum):
    """The part a tensor plays."""

    LINEAR = "linear"
    """Weight of a matrix multiplication: the layers that SplitQuantV2 splits."""
    EMBEDDING = "embedding"
    """Token embedding; when the head is tied it is the head too."""
    HEAD = "head"
    """Untied output head."""
    OTHER = "other"
    """Norms, biases, routers, convolutions, rope factors, position embeddings: never split."""


def role_of(tensor: SourceTensor) -> Role:
    """The role of a tensor."""
    if tensor.name == "token_embd.weight":
        return Role.EMBEDDING
    if tensor.name == "output.weight":
        return Role.HEAD
    if (
        len(tensor.shape) < 2
        or tensor.force_f32
        or tensor.keep_type
        or not tensor.name.endswith(".weight")
        or "norm" in tensor.name
        or tensor.name.endswith(ALWAYS_F32)
    ):
        return Role.OTHER
    return Role.LINEAR
