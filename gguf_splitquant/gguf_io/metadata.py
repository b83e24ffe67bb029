"""The metadata that our files carry beyond the model's own (``splitquant.*``).

A split file says how it was made (the recipe as JSON), by what, how many parameters the float model has
(llama.cpp counts the sub-layers too), and how far each split weight is from its original.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from gguf import GGML_QUANT_VERSION, GGUFValue, GGUFValueType, Keys

from .. import __version__
from ..planning.plan import Plan
from ..sources.model import SourceModel

FORMAT_VERSION = 2

KEY_VERSION = "splitquant.version"
KEY_LAYOUT = "splitquant.layout"
KEY_RECIPE = "splitquant.recipe"
KEY_PARAMETER_COUNT = "splitquant.parameter_count"
KEY_QUANTIZED_TENSORS = "splitquant.quantized_tensors"
KEY_RELATIVE_ERROR = "splitquant.relative_error"
KEY_CALIBRATION = "splitquant.calibration"
"""Digest of the statistics of layer inputs that the file was made with."""
KEY_QUANTIZED_BY = Keys.General.QUANTIZED_BY

KEY_ORDER_WEIGHTS = "splitquant.order.weights"
KEY_ORDER_TENSORS = "splitquant.order.tensors"
"""Weights whose clusters read their input in a channel order, and the tensor that holds it for each."""


def file_metadata(
    model: SourceModel,
    plan: Plan,
    relative_errors: Mapping[str, float],
    calibration: str = "",
    number: int = 0,
    tensors: Collection[str] | None = None,
) -> dict[str, GGUFValue]:
    """All key-value pairs of a file, or of one of several; those of shards as such are not among them.

    A file in the float layout gets exactly what llama.cpp's converter writes. Of several files the first has
    what concerns the model; the errors of its weights stand in each, so that it can be written without the
    others.

    Args:
        model: the source.
        plan: its plan.
        relative_errors: per quantized weight, sum((w - decoded)**2) / sum(w**2). The keys may be filled in
            later: the header's size does not depend on the figures.
        calibration: digest of the statistics of layer inputs; empty if there were none.
        number: of the file, from 0.
        tensors: the output tensors in it; None: all.
    """
    pairs = _model_metadata(model, plan, calibration) if number == 0 else {}
    if plan.recipe.layout == "float":
        return pairs
    # a weight whose sub-layers lie in two files is one of the first of them
    quantized = [
        t.source.name
        for t in plan.tensors
        if t.quantized and (tensors is None or t.outputs[0].name in tensors)
    ]
    if quantized:
        errors = [float(np.float32(relative_errors.get(name, 0.0))) for name in quantized]
        pairs[KEY_QUANTIZED_TENSORS] = _strings(quantized)
        pairs[KEY_RELATIVE_ERROR] = GGUFValue(errors, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
    return pairs


def errors_in(metadata: Mapping[str, Any]) -> dict[str, float]:
    """What one file records for its weights (:func:`file_metadata`); empty where it does not record it well.

    Args:
        metadata: of the file's header (:class:`.header.GGUFHeader`): anything, if the file is a stranger's.
    """
    names, errors = metadata.get(KEY_QUANTIZED_TENSORS), metadata.get(KEY_RELATIVE_ERROR)
    if not isinstance(names, list) or not isinstance(errors, np.ndarray) or len(names) != len(errors):
        return {}
    return {name: float(error) for name, error in zip(names, errors, strict=True)}


def _model_metadata(model: SourceModel, plan: Plan, calibration: str) -> dict[str, GGUFValue]:
    pairs = dict(model.metadata)
    pairs[Keys.General.FILE_TYPE] = _u32(int(plan.file_type))
    pairs[Keys.General.QUANTIZATION_VERSION] = _u32(GGML_QUANT_VERSION)
    if plan.recipe.layout == "float":
        return pairs
    pairs[KEY_QUANTIZED_BY] = _string(f"gguf-splitquant {__version__}")
    pairs[KEY_VERSION] = _u32(FORMAT_VERSION)
    pairs[KEY_LAYOUT] = _string(plan.recipe.layout)
    pairs[KEY_RECIPE] = _string(plan.recipe.to_json())
    pairs[KEY_PARAMETER_COUNT] = GGUFValue(model.n_params, GGUFValueType.UINT64)
    if calibration:
        pairs[KEY_CALIBRATION] = _string(calibration)
    ordered = {t.source.name: t.order.name for t in plan.tensors if t.order is not None}
    if ordered:
        pairs[KEY_ORDER_WEIGHTS] = _strings(list(ordered))
        pairs[KEY_ORDER_TENSORS] = _strings(list(ordered.values()))
    return pairs


def _u32(value: int) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.UINT32)


def _string(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


def _strings(values: list[str]) -> GGUFValue:
    return GGUFValue(values, GGUFValueType.ARRAY, GGUFValueType.STRING)
