"""A Hugging Face checkpoint as a :class:`~gguf_splitquant.sources.model.SourceModel`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
from gguf import GGUFValue

from ..errors import CheckpointError
from ..gguf_io.pairs import item_type
from .card import check_card
from .checkpoint import Checkpoint, open_checkpoint
from .config import is_text, read_json_if_there, shown
from .families import FAMILIES, family_class
from .model import SourceModel, SourceTensor

_MAX_FLOAT32 = 3.4028234663852886e38


def read_checkpoint(folder: Path, pre_tokenizer: str | None = None) -> SourceModel:
    """Open a checkpoint; see :func:`gguf_splitquant.sources.open_model`."""
    checkpoint = open_checkpoint(folder, FAMILIES)
    family = family_class(checkpoint.architecture)(checkpoint)
    tensors = tuple(family.tensors())
    # without a path the writer only collects what it is given
    writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[family.arch])
    writer.add_type(gguf.GGUFType.MODEL)
    _add_general(writer, checkpoint, tensors)
    family.add_parameters(writer)
    family.add_tokenizer(writer, pre_tokenizer)
    metadata: dict[str, GGUFValue] = dict(writer.kv_data[0])
    _check_values(metadata, folder)
    return SourceModel(
        architecture=gguf.MODEL_ARCH_NAMES[family.arch],
        metadata=metadata,
        tensors=tensors,
        tied_head=all(tensor.name != "output.weight" for tensor in tensors),
        files=tuple(dict.fromkeys(stored.file.path for stored in checkpoint.tensors.values())),
    )


def _add_general(writer: gguf.GGUFWriter, checkpoint: Checkpoint, tensors: tuple[SourceTensor, ...]) -> None:
    """Name, authors, licence, sampling defaults: from model card, configs and folder name."""
    for tensor in tensors:
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            tensor.dtype.raw_dtype,
            0,
            gguf.GGMLQuantizationType[tensor.dtype.value],
        )
    total, shared, experts, n_experts = writer.get_total_parameter_count()
    # the folder's name stands in for a model name that is given nowhere: "." has none
    folder = Path(os.path.abspath(checkpoint.folder))  # noqa: PTH100 (resolve() would follow links)
    # gguf-py reads both again, without limits
    check_card(folder / "README.md")
    generation = read_json_if_there(folder / "generation_config.json") or {}
    try:
        general = gguf.Metadata.load(None, folder, None, total)
        if general.name is None:
            general.name = folder.name
        if general.size_label is None and total > 0:
            general.size_label = gguf.size_label(total, shared, experts, n_experts)
        if general.sampling_penalty_repeat is None:
            # llama.cpp's own gguf-py reads transformers' name of it too, the release on PyPI does not
            general.sampling_penalty_repeat = generation.get("repetition_penalty")
        general.set_gguf_meta_model(writer)
    # gguf-py takes the types of these fields for granted, and YAML's dates and numbers their ranges
    except Exception as error:
        raise CheckpointError(
            folder,
            "the head of README.md, or _name_or_path in config.json, has a value of a wrong type "
            f"({type(error).__name__}: {str(error)[:200]})",
            "correct it, or move README.md away",
        ) from error


def _check_values(metadata: dict[str, GGUFValue], folder: Path) -> None:
    """Model card and generation config can hold anything: refuse here what a writer could not store."""
    for key, value in metadata.items():
        array = value.type is gguf.GGUFValueType.ARRAY
        items = value.value if array else [value.value]
        item_type = value.sub_type or _type_of(items) if array else value.type
        if item_type is None or not all(_fits(item, item_type) for item in items):
            wanted = item_type.name.lower() if item_type else "list of one type"
            raise CheckpointError(
                folder,
                f"{key} would be {shown(value.value)}, not a {wanted}",
                "correct it in README.md, config.json, generation_config.json or the folder's name",
            )


def _type_of(items: list[Any]) -> gguf.GGUFValueType | None:
    """Of the items of an array; None where they differ, or are no values."""
    try:
        found = item_type(items)
    except ValueError:
        return None
    return None if found is gguf.GGUFValueType.ARRAY else found


def _fits(value: Any, value_type: gguf.GGUFValueType) -> bool:
    match value_type:
        case gguf.GGUFValueType.STRING:
            return is_text(value) if isinstance(value, str) else isinstance(value, bytes)
        case gguf.GGUFValueType.FLOAT32:
            return isinstance(value, (int, float)) and abs(value) <= _MAX_FLOAT32
        case gguf.GGUFValueType.UINT32:
            return isinstance(value, int) and 0 <= value < 2**32
        case gguf.GGUFValueType.INT32:
            return isinstance(value, int) and -(2**31) <= value < 2**31
    return True
