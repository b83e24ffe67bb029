"""The plan: every output tensor with its type and size, so the file's layout is known before it is written.

Planning reads names, shapes and types only. That makes ``--dry-run`` exact, lets tensors be written in any
order at their final offsets, and keeps all decisions in one place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ..packing.encodings import LinearEncoding, choose_encoding
from ..recipe import Recipe
from ..sources.model import FloatType, SourceModel, SourceTensor
from .roles import Role, role_of

_FLOAT_QTYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}

_FILE_TYPES = {
    GGMLQuantizationType.F32: LlamaFileType.ALL_F32,
    GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16,
    GGMLQuantizationType.BF16: LlamaFileType.MOSTLY_BF16,
    GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
    GGMLQuantizationType.Q4_1: LlamaFileType.MOSTLY_Q4_1,
    GGMLQuantizationType.Q4_K: LlamaFileType.MOSTLY_Q4_K_S,
    GGMLQuantizationType.Q2_K: LlamaFileType.MOSTLY_Q2_K,
    GGMLQuantizationType.Q3_K: LlamaFileType.MOSTLY_Q3_K_S,
    GGMLQuantizationType.IQ4_XS: LlamaFileType.MOSTLY_IQ4_XS,
    GGMLQuantizationType.Q4_0: LlamaFileType.MOSTLY_Q4_0,
    GGMLQuantizationType.IQ4_NL: LlamaFileType.MOSTLY_IQ4_NL,
    GGMLQuantizationType.Q5_0: LlamaFileType.MOSTLY_Q5_0,
    GGMLQuantizationType.Q5_1: LlamaFileType.MOSTLY_Q5_1,
    GGMLQuantizationType.Q5_K: LlamaFileType.MOSTLY_Q5_K_S,
    GGMLQuantizationType.Q6_K: LlamaFileType.MOSTLY_Q6_K,
}

# what a row that is not whole super-blocks of 256 gets instead: tensor_type_fallback in llama-quant.cpp
_NARROW_TYPES = {
    GGMLQuantizationType.Q2_K: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q3_K: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the file.

    Attributes:
        name: GGUF name.
        qtype: ggml type.
        shape: logical shape, numpy order.
    """

    name: str
    qtype: GGMLQuantizationType
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last axis)."""
        block, size = GGML_QUANT_SIZES[self.qtype]
        return int(self.shape[-1] // block * size)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return int(np.prod(self.shape[:-1], dtype=np.int64)) * self.row_bytes


@dataclass(frozen=True)
class TensorPlan:
    """What becomes of one source tensor.

    Attributes:
        source: the tensor.
        role: its part in the model.
        outputs: the tensors it becomes: one, or the sub-layers in order.
        encoding: how linear codes are carried; None for outputs that have none.
        refined: quantized into its one output's type with error feedback.
        note: why it is not treated as the recipe says; empty if it is.
    """

    source: SourceTensor
    role: Role
    outputs: tuple[OutputTensor, ...]
    encoding: LinearEncoding | None = None
    refined: bool = False
    note: str = ""

    @property
    def quantized(self) -> bool:
        """The recipe applies: the weight is split or quantized, not copied."""
        return self.encoding is not None or self.refined or len(self.outputs) > 1

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum(o.nbytes for o in self.outputs)


@dataclass(frozen=True)
class Plan:
    """The whole file's plan.

    Attributes:
        recipe: what it was made from.
        tensors: in file order.
        file_type: ``general.file_type``: the type that most weights have.
    """

    recipe: Recipe
    tensors: tuple[TensorPlan, ...]
    file_type: LlamaFileType

    @property
    def outputs(self) -> tuple[OutputTensor, ...]:
        """All output tensors, in file order."""
        return tuple(o for t in self.tensors for o in t.outputs)

    def bpw(self, *roles: Role) -> float:
        """Stored bits per weight of the model, over the given roles (all if none is given)."""
        chosen = [t for t in self.tensors if not roles or t.role in roles]
        n_params = sum(t.source.n_params for t in chosen)
        return 8 * sum(t.nbytes for t in chosen) / n_params if n_params else 0.0


def split_name(name: str, index: int) -> str:
    """Name of a sub-layer: ``blk.0.attn_q.weight`` becomes ``blk.0.attn_q.split1.weight``.

    Extras end in ``.weight`` because llama.cpp's tools take only such tensors for weights. Sub-layer 0 keeps
    the standard name.
    """
    return name if index == 0 else f"{name.removesuffix('.weight')}.split{index}.weight"


def make_plan(model: SourceModel, recipe: Recipe) -> Plan:
    """Decide on every tensor of a model. Reads no weights."""
    float_qtype = _float_qtype(model, recipe)
    tensors = tuple(_plan_tensor(t, recipe, float_qtype) for t in model.tensors)
    return Plan(recipe, tensors, _file_type(tensors, float_qtype))


def _float_qtype(model: SourceModel, recipe: Recipe) -> GGMLQuantizationType:
    if recipe.outtype != "auto":
        return _FLOAT_QTYPES[recipe.outtype]
    matrices = [t.dtype for t in model.tensors if len(t.shape) > 1]
    bf16 = matrices.count(FloatType.BF16) > len(matrices) / 2
    return GGMLQuantizationType.BF16 if bf16 else GGMLQuantizationType.F16


def _plan_tensor(tensor: SourceTensor, recipe: Recipe, float_qtype: GGMLQuantizationType) -> TensorPlan:
    role = role_of(tensor)
    note = ""
    if recipe.layout != "float" and (role is Role.LINEAR or (role is Role.HEAD and recipe.split_head)):
        plan = _plan_split if recipe.layout == "split" else _plan_stock
        planned, note = plan(tensor, role, recipe)
        if planned is not None:
            return planned
    qtype = GGMLQuantizationType.F32 if stored_as_f32(tensor) else float_qtype
    return TensorPlan(tensor, role, (OutputTensor(tensor.name, qtype, tensor.shape),), note=note)


def _plan_split(tensor: SourceTensor, role: Role, recipe: Recipe) -> tuple[TensorPlan | None, str]:
    """The split of one weight, or None and the reason why it stays float."""
    encoding = None
    qtype = GGMLQuantizationType.F32
    if recipe.bits != 32:
        encoding = choose_encoding(recipe.bits, tensor.shape[-1], recipe.granularity)
        if encoding is None:
            return None, f"{tensor.shape[-1]} columns are not whole blocks of 32, so it stays float"
        qtype = encoding.qtype
    outputs = tuple(OutputTensor(split_name(tensor.name, i), qtype, tensor.shape) for i in range(recipe.k))
    return TensorPlan(tensor, role, outputs, encoding), ""


def _plan_stock(tensor: SourceTensor, role: Role, recipe: Recipe) -> tuple[TensorPlan | None, str]:
    """One stock tensor for one weight, or None and the reason why it stays float."""
    wanted = qtype = GGMLQuantizationType[recipe.qtype]
    columns = tensor.shape[-1]
    if len(tensor.shape) > 2:
        return None, "stacked experts are not refined yet, so they stay float"
    if columns % GGML_QUANT_SIZES[qtype][0]:
        qtype = _NARROW_TYPES.get(qtype, qtype)
    if columns % GGML_QUANT_SIZES[qtype][0]:
        return None, f"{columns} columns are not whole blocks of 32, so it stays float"
    note = "" if qtype is wanted else f"{columns} columns are not whole blocks of 256: {qtype.name} instead"
    output = OutputTensor(tensor.name, qtype, tensor.shape)
    return TensorPlan(tensor, role, (output,), refined=True, note=note), ""


def stored_as_f32(tensor: SourceTensor) -> bool:
    """What every GGUF stores as F32: the rule of ``prepare_tensors`` in llama.cpp's conversion/base.py."""
    return (
        len(tensor.shape) < 2
        or tensor.force_f32
        or tensor.name.endswith("_norm.weight")
        or not tensor.name.endswith(".weight")
    )


def _file_type(tensors: tuple[TensorPlan, ...], float_qtype: GGMLQuantizationType) -> LlamaFileType:
    weights: dict[GGMLQuantizationType, int] = {}
    for plan in tensors:
        if plan.quantized:
            qtype = plan.outputs[0].qtype
            weights[qtype] = weights.get(qtype, 0) + plan.source.n_params
    main = max(weights, key=lambda q: weights[q]) if weights else float_qtype
    return _FILE_TYPES[main]
