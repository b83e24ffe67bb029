"""What each ggml type costs and loses: the points between which the planner chooses.

The loss of quantizing a weight with error feedback is, to within a tenth, a constant of the type times
``sum_i d_i v_i``: d_i the part of an input channel's second moment that later channels cannot make good
(the squared spread of :class:`~gguf_splitquant.refining.metric.Feedback`), v_i the channel's sum of squared
weights. The constants were measured with :class:`~gguf_splitquant.refining.Refiner` on 25 weights of
SmolLM2-135M (pseudo-float, reordered), all seven kinds, five layers; they are the medians.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..recipe import GGML_TYPES


@dataclass(frozen=True)
class Rate:
    """One type.

    Attributes:
        qtype: the ggml type.
        bits: per weight, scales included.
        block: columns per block.
        loss: as a fraction of ``sum_i d_i v_i``.
    """

    qtype: GGMLQuantizationType
    bits: float
    block: int
    loss: float


_LOSSES = {
    GGMLQuantizationType.Q2_K: 6.0e-2,
    GGMLQuantizationType.Q3_K: 2.02e-2,
    GGMLQuantizationType.IQ4_XS: 5.2e-3,
    GGMLQuantizationType.IQ4_NL: 5.05e-3,
    GGMLQuantizationType.Q4_K: 4.7e-3,
    GGMLQuantizationType.Q4_1: 4.4e-3,
    GGMLQuantizationType.Q5_0: 1.6e-3,
    GGMLQuantizationType.Q5_K: 1.17e-3,
    GGMLQuantizationType.Q5_1: 1.04e-3,
    GGMLQuantizationType.Q6_K: 2.8e-4,
    GGMLQuantizationType.Q8_0: 2.35e-5,
}


def _rate(qtype: GGMLQuantizationType, loss: float) -> Rate:
    block, size = GGML_QUANT_SIZES[qtype]
    return Rate(qtype, 8 * size / block, block, loss)


RATES: tuple[Rate, ...] = tuple(_rate(qtype, loss) for qtype, loss in _LOSSES.items())
"""The planner's types, smallest first."""


# What a row that is not whole super-blocks of 256 gets instead: tensor_type_fallback in llama-quant.cpp
_NARROW_TYPES = {
    **dict.fromkeys((GGMLQuantizationType[name] for name in GGML_TYPES), GGMLQuantizationType.IQ4_NL),
    GGMLQuantizationType.Q2_K: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q3_K: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.IQ4_XS: GGMLQuantizationType.IQ4_NL,
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


def narrow_type(
    qtype: GGMLQuantizationType, columns: int, avoid: Collection[str] = ()
) -> GGMLQuantizationType | None:
    """``qtype``, or what rows of ``columns`` values get instead; None if they fill no block of 32.

    Args:
        qtype: the wanted type.
        columns: of the weight.
        avoid: names of types that must not come instead.
    """
    if columns % GGML_QUANT_SIZES[qtype][0]:
        qtype = _NARROW_TYPES.get(qtype, qtype)
        if qtype.name in avoid:
            qtype = GGMLQuantizationType.Q4_1
    return None if columns % GGML_QUANT_SIZES[qtype][0] else qtype
