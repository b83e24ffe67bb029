"""The plan: every output tensor with its type and size, so the file's layout is known before it is written.

Planning reads names, shapes and types only. That makes ``--dry-run`` exact, lets tensors be written in any
order at their final offsets, and keeps all decisions in one place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from ..errors import RecipeError
from ..packing.encodings import LinearEncoding, choose_encoding
from ..recipe import GGML_TYPES, Recipe
from ..sources.model import FloatType, SourceModel, SourceTensor
from .orders import ChannelOrder
from .rates import narrow_type
from .refined import RefinedPlan, one_type
from .roles import Role, role_of

_FLOAT_QTYPES = {
    "f32": GGMLQuantizationType.F32,
    "f16": GGMLQuantizationType.F16,
    "bf16": GGMLQuantizationType.BF16,
}

_FILE_TYPES = {
    **{GGMLQuantizationType[name]: LlamaFileType[f"MOSTLY_{name}"] for name in GGML_TYPES},
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
        outputs: the tensors it becomes: one, or the sub-layers in order; then the channel order, if this is
            the first weight that reads it.
        encoding: how linear codes are carried; None for outputs that have none.
        refined: quantized into the outputs' types with error feedback.
        order: the channel order of clusters that are refined.
        note: why it is not treated as the recipe says; empty if it is.
    """

    source: SourceTensor
    role: Role
    outputs: tuple[OutputTensor, ...]
    encoding: LinearEncoding | None = None
    refined: bool = False
    order: ChannelOrder | None = None
    note: str = ""

    @property
    def quantized(self) -> bool:
        """The recipe applies: the weight is split or quantized, not copied."""
        return self.encoding is not None or self.refined or len(self.outputs) > 1

    @property
    def sub_layers(self) -> tuple[OutputTensor, ...]:
        """The outputs that hold weights."""
        return tuple(o for o in self.outputs if o.qtype is not GGMLQuantizationType.I8)

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


def make_plan(model: SourceModel, recipe: Recipe, refined: RefinedPlan | None = None) -> Plan:
    """Decide on every tensor of a model. Reads no weights.

    Args:
        model: the source.
        recipe: how.
        refined: types and clusters of the linear layers, for a recipe with a target.

    Raises:
        RecipeError: the recipe has a target and ``refined`` is missing.
    """
    if recipe.refined and refined is None:
        if not recipe.qtype:
            raise RecipeError("plan", "the recipe's target needs one", "make it with plan_refined")
        refined = one_type(model, recipe)
    float_qtype = _float_qtype(model, recipe)
    tensors = []
    written: set[str] = set()
    for tensor in model.tensors:
        plan = _plan_tensor(tensor, recipe, refined, float_qtype)
        if plan.order is not None and plan.order.name not in written:
            written.add(plan.order.name)
            order = OutputTensor(plan.order.name, GGMLQuantizationType.I8, plan.order.stored.shape)
            plan = dataclasses.replace(plan, outputs=(*plan.outputs, order))
        tensors.append(plan)
    return Plan(recipe, tuple(tensors), _file_type(tensors, float_qtype))


def _float_qtype(model: SourceModel, recipe: Recipe) -> GGMLQuantizationType:
    if recipe.outtype != "auto":
        return _FLOAT_QTYPES[recipe.outtype]
    matrices = [t.dtype for t in model.tensors if len(t.shape) > 1]
    bf16 = matrices.count(FloatType.BF16) > len(matrices) / 2
    return GGMLQuantizationType.BF16 if bf16 else GGMLQuantizationType.F16


def _plan_tensor(
    tensor: SourceTensor, recipe: Recipe, refined: RefinedPlan | None, float_qtype: GGMLQuantizationType
) -> TensorPlan:
    role = role_of(tensor)
    note = ""
    if role is Role.EMBEDDING and recipe.embedding:
        qtype = narrow_type(GGMLQuantizationType[recipe.embedding], tensor.shape[-1], recipe.avoid)
        if qtype is not None:
            output = OutputTensor(tensor.name, qtype, tensor.shape)
            return TensorPlan(tensor, role, (output,), refined=True)
    if recipe.layout != "float" and (role is Role.LINEAR or (role is Role.HEAD and recipe.split_head)):
        if refined is not None:
            planned, note = _plan_refined(tensor, role, recipe, refined)
        else:
            planned, note = _plan_split(tensor, role, recipe)
        if planned is not None:
            return planned
    if tensor.keep_type:
        float_qtype = _FLOAT_QTYPES[tensor.dtype.value.lower()]
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


def _plan_refined(
    tensor: SourceTensor, role: Role, recipe: Recipe, refined: RefinedPlan
) -> tuple[TensorPlan | None, str]:
    """The clusters of one weight, or None and the reason why it stays float."""
    pieces = refined.pieces.get(tensor.name)
    if pieces is None:
        return None, f"{tensor.shape[-1]} columns are not whole blocks of 32, so it stays float"
    outputs = tuple(
        OutputTensor(split_name(tensor.name, i), piece.qtype, (*tensor.shape[:-1], piece.width))
        for i, piece in enumerate(pieces)
    )
    wanted, given = recipe.fixed_type(tensor.name), pieces[0].qtype
    narrow = narrow_type(GGMLQuantizationType[wanted], tensor.shape[-1], recipe.avoid) if wanted else None
    note = ""
    # a plan that was edited may have any other type
    if given.name != wanted and given == narrow and len(pieces) == 1:
        note = f"{tensor.shape[-1]} columns are not whole blocks of 256: {given.name} instead"
    order = refined.orders.get(tensor.name)
    return TensorPlan(tensor, role, outputs, refined=True, order=order, note=note), ""


def stored_as_f32(tensor: SourceTensor) -> bool:
    """What every GGUF stores as F32: the rule of ``prepare_tensors`` in llama.cpp's conversion/base.py."""
    if tensor.keep_type:
        return tensor.dtype is FloatType.F32
    return (
        len(tensor.shape) < 2
        or tensor.force_f32
        or tensor.name.endswith("_norm.weight")
        or not tensor.name.endswith(".weight")
    )


def _file_type(tensors: Sequence[TensorPlan], float_qtype: GGMLQuantizationType) -> LlamaFileType:
    weights: dict[GGMLQuantizationType, int] = {}
    for plan in tensors:
        if plan.quantized:
            for output in plan.sub_layers:
                weights[output.qtype] = weights.get(output.qtype, 0) + output.nbytes
    main = max(weights, key=lambda q: weights[q]) if weights else float_qtype
    return _FILE_TYPES[main]
