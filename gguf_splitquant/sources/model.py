"""What every source delivers, whatever it read: GGUF metadata and float tensors under GGUF names.

The rest of the pipeline sees only these types, so a new family, or a GGUF file as input, needs no change
downstream. Tensors are read by row slab: the largest one never has to be in memory as a whole.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValue
from numpy.typing import NDArray


class FloatType(str, enum.Enum):
    """Float storage types of a checkpoint, by their GGUF names."""

    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"

    @property
    def itemsize(self) -> int:
        """Bytes per value."""
        return 4 if self is FloatType.F32 else 2

    @property
    def raw_dtype(self) -> np.dtype[Any]:
        """The numpy dtype that holds it as read: BF16 has none of its own and comes as its bit pattern."""
        return np.dtype({"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[self.value])


ALWAYS_F32 = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "position_embd.weight",
    "token_types.weight",
    "ssm_conv1d.weight",
)
"""Endings of matrices that are F32 in every file: routers, tables of positions, convolutions
(``prepare_tensors`` in llama.cpp's conversion/base.py)."""


def to_float32(raw: NDArray[Any], dtype: FloatType) -> NDArray[np.float32]:
    """Raw values of ``dtype`` as float32 (exact). Same shape; float32 input is returned as it is."""
    if dtype is FloatType.BF16:
        # in one pass: widened first and shifted then, it takes four times as long
        widened: NDArray[np.uint32] = np.left_shift(raw, np.uint32(16), dtype=np.uint32)
        return widened.view(np.float32)
    return raw.astype(np.float32, copy=False)


@dataclass(frozen=True)
class SourceTensor:
    """One float tensor of the model, under its GGUF name, not yet read.

    Attributes:
        name: GGUF name, such as ``blk.0.attn_q.weight``.
        shape: numpy order: ``(rows, columns)`` for a linear layer, ``(experts, rows, columns)`` for expert
            stacks, ``(n,)`` for norms and biases. (GGUF lists dimensions the other way round.)
        dtype: storage type in the checkpoint.
        read_rows: ``read_rows(start, stop)`` reads that slab along the first axis:
            shape ``(stop - start, *shape[1:])``, dtype ``dtype.raw_dtype``. Thread-safe.
        origin: where it comes from (file and checkpoint name), for error messages.
        force_f32: stored as F32 in every file: llama.cpp needs it so (rope factors, routers, ...),
            whatever the usual rule by rank and name says.
        keep_type: stored in its own type in every file, and never split: of a GGUF file, what is not known
            to be a linear layer.
    """

    name: str
    shape: tuple[int, ...]
    dtype: FloatType
    read_rows: Callable[[int, int], NDArray[Any]] = field(repr=False, compare=False)
    origin: str = ""
    force_f32: bool = False
    keep_type: bool = False

    @property
    def n_params(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of its values, in its own type."""
        return self.n_params * self.dtype.itemsize

    def read(self) -> NDArray[Any]:
        """The whole tensor, raw."""
        return self.read_rows(0, self.shape[0])


@dataclass(frozen=True)
class SourceModel:
    """A model as the pipeline sees it.

    Attributes:
        architecture: llama.cpp's name (``general.architecture``), such as ``llama``.
        metadata: GGUF key-value pairs in file order, all that does not depend on the recipe (so without
            ``general.file_type`` and ``general.quantization_version``).
        tensors: in file order.
        tied_head: the output head is the token embedding.
        notes: what a user should know about it before trusting the result, as sentences.
        float_file: a float GGUF file that is this very model, where it was read from one.
        files: what the weights are read from; empty for a model that is made in memory.
    """

    architecture: str
    metadata: Mapping[str, GGUFValue]
    tensors: tuple[SourceTensor, ...]
    tied_head: bool
    notes: tuple[str, ...] = ()
    float_file: Path | None = None
    files: tuple[Path, ...] = ()

    @property
    def n_params(self) -> int:
        """Parameters of the float model; sub-layers never count twice."""
        return sum(t.n_params for t in self.tensors)
