"""A GGUF file as a :class:`~gguf_splitquant.sources.model.SourceModel`, of any architecture.

The file says everything already, under GGUF names: metadata is carried over, tensors are read by row slab at
their places. What a family knows about single tensors (which ones are F32 in every file) has to be seen from
the file itself: a tensor that llama-quantize would leave alone, or that is F32 among 16-bit ones, keeps the
type that it has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValue, GGUFValueType, Keys, quants
from numpy.typing import NDArray

from ..bounded import open_regular
from ..errors import CheckpointError, TokenizerError, UnsupportedModelError
from ..gguf_io.header import GGUFHeader, TensorEntry, read_header
from ..gguf_io.pairs import read_pairs
from .model import FloatType, SourceModel, SourceTensor
from .reading import PositionedFile, StoredRows

_FLOATS = {GGMLQuantizationType[kind.value]: kind for kind in FloatType}
_NO_WEIGHTS = {GGMLQuantizationType[name] for name in ("I8", "I16", "I32", "I64", "F64")}

_HEADS = ("token_embd.weight", "output.weight")
_LINEAR = re.compile(r"(enc\.|dec\.)?blk\.\d+\..*\.weight")
# tensor_allows_quantization in llama.cpp's src/llama-quant.cpp; time_mix_* are RWKV's small matrices
_LEFT_ALONE = (
    *("norm", "ffn_gate_inp", "altup", "laurel", "ssm_conv1d", "shortconv.conv"),
    *("indexer.", "attn_rel_b", "time_mix_first", "time_mix_lerp", "time_mix_decay"),
    *(f"time_mix_{letter}{i}" for letter in "wvag" for i in range(3)),
)
_SPLIT_NAME = re.compile(r"\.split[1-9]\d*\.weight$")

_NOT_CARRIED = ("split.", "splitquant.", "quantize.imatrix.")
"""Beginnings of keys that say how this one file was made."""
_WRITTEN_ANEW = (
    Keys.General.FILE_TYPE,
    Keys.General.QUANTIZATION_VERSION,
    Keys.General.ALIGNMENT,
    Keys.General.QUANTIZED_BY,
)


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is a file that begins as GGUF does, or is named as one."""
    if not path.is_file():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    with open_regular(path) as file:
        return file.read(4) == b"GGUF"


def read_gguf(path: Path, pre_tokenizer: str | None = None, *, allow_requantize: bool = False) -> SourceModel:
    """Open a GGUF file; no weights are read.

    Args:
        path: the file; of a model in shards, the first.
        pre_tokenizer: instead of the file's own.
        allow_requantize: also take weights that are already quantized; the model's notes say what that loses.

    Raises:
        GGUFError: the file is damaged, or a shard is missing.
        UnsupportedModelError: it is already quantized or split, or is not a language model.
        TokenizerError: no pre-tokenizer of this name.
    """
    header = read_header(path)
    pairs = read_pairs(path)
    architecture = _architecture(path, pairs)
    _refuse_other_files(header, pairs)
    notes = _quantized_note(header, allow_requantize)
    if pre_tokenizer is not None:
        _replace_pre_tokenizer(path, pairs, pre_tokenizer)
    metadata = {
        key: value
        for key, value in pairs.items()
        # gguf-py writes no empty array
        if not key.startswith(_NOT_CARRIED) and key not in _WRITTEN_ANEW and value.value != []
    }
    tensors = tuple(_tensors(header))
    is_float = len(header.shards) == 1 and not notes
    return SourceModel(
        architecture=architecture,
        metadata=metadata,
        tensors=tensors,
        tied_head=all(tensor.name != "output.weight" for tensor in tensors),
        notes=notes,
        float_file=path if is_float else None,
        files=header.shards,
    )


def _architecture(path: Path, pairs: Mapping[str, GGUFValue]) -> str:
    value = pairs.get(Keys.General.ARCHITECTURE)
    if value is None or not isinstance(value.value, str) or not value.value:
        raise CheckpointError(path, f"has no {Keys.General.ARCHITECTURE}", "give a GGUF file that is a model")
    return value.value


def _refuse_other_files(header: GGUFHeader, pairs: Mapping[str, GGUFValue]) -> None:
    kind = pairs.get(Keys.General.TYPE)
    if kind is not None and kind.value != "model":
        raise UnsupportedModelError(
            header.path,
            f"is a GGUF file of type {str(kind.value)[:60]!r}, not a model",
            "give the model's file",
        )
    split = [t.name for t in header.tensors if _SPLIT_NAME.search(t.name)]
    if split:
        raise UnsupportedModelError(
            header.path,
            f"is already split ({split[0]} and {len(split) - 1} more sub-layers)",
            "convert from the original float model",
        )
    for tensor in header.tensors:
        if 0 in tensor.shape:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {tensor.name}", "has no values", "get the file again"
            )
        if tensor.qtype in _NO_WEIGHTS:
            raise UnsupportedModelError(
                f"{tensor.file.name}: tensor {tensor.name}",
                f"is {tensor.qtype.name}: only floats and quantized floats are converted",
                "use llama.cpp's llama-quantize for this model",
            )
    if not header.tensors:
        raise UnsupportedModelError(
            header.path, "holds no weights, only a vocabulary", "give the model's file"
        )


def _quantized_note(header: GGUFHeader, allowed: bool) -> tuple[str, ...]:
    """What is lost already. Raises UnsupportedModelError unless that is ``allowed``."""
    quantized = [t for t in header.tensors if t.qtype not in _FLOATS]
    if not quantized:
        return ()
    n_params = sum(t.n_params for t in quantized)
    types = Counter(t.qtype.name for t in quantized)
    share = n_params / sum(t.n_params for t in header.tensors)
    counted = ", ".join(f"{n} {name}" for name, n in types.most_common())
    found = f"{n_params:,} of its weights ({share:.0%}) are already quantized: {counted}"
    if not allowed:
        raise UnsupportedModelError(
            header.path, found, "convert from the float model, or pass --allow-requantize to lose twice"
        )
    for tensor in quantized:
        if not _can_be_decoded(tensor.qtype):
            raise UnsupportedModelError(
                f"{tensor.file.name}: tensor {tensor.name}",
                f"no decoder for {tensor.qtype.name}",
                "convert from the original float model",
            )
    note = f"{found}. What that lost is not won back, and quantizing them again loses more"
    return (f"{header.path.name}: {note}",)


def _can_be_decoded(qtype: GGMLQuantizationType) -> bool:
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[qtype][1]), np.uint8), qtype)
    except NotImplementedError:
        return False
    return True


def _replace_pre_tokenizer(path: Path, pairs: dict[str, GGUFValue], name: str) -> None:
    # the table of pre-tokenizers: only for those who name one
    from .tokenizers.pre_tokenizer import PreTokenizers

    if Keys.Tokenizer.PRE not in pairs:
        raise TokenizerError(path, "its tokenizer has no pre-tokenizer", "leave --pre out")
    PreTokenizers.load().check_name(name)
    pairs[Keys.Tokenizer.PRE] = GGUFValue(name, GGUFValueType.STRING)


def _tensors(header: GGUFHeader) -> Sequence[SourceTensor]:
    files = {path: PositionedFile(path) for path in header.shards}
    matrices = [t.qtype for t in header.tensors if _may_be_linear(t)]
    f32_is_rare = 2 * matrices.count(GGMLQuantizationType.F32) < len(matrices)
    return [_tensor(entry, files[entry.file], f32_is_rare) for entry in header.tensors]


def _may_be_linear(entry: TensorEntry) -> bool:
    name = entry.name
    return name in _HEADS or (
        len(entry.shape) in (2, 3)
        and _LINEAR.fullmatch(name) is not None
        and not any(part in name for part in _LEFT_ALONE)
    )


def _tensor(entry: TensorEntry, file: PositionedFile, f32_is_rare: bool) -> SourceTensor:
    origin = f"{file.path.name}: tensor {entry.name}"
    dtype = _FLOATS.get(entry.qtype)
    if dtype is None:
        return SourceTensor(entry.name, entry.shape, FloatType.F32, _decoder(entry, file), origin)
    forced = entry.qtype is GGMLQuantizationType.F32 and f32_is_rare and entry.name not in _HEADS
    keep = forced or not _may_be_linear(entry)
    rows = StoredRows(file, entry.offset, entry.shape, dtype.raw_dtype)
    return SourceTensor(entry.name, entry.shape, dtype, rows, origin, keep_type=keep)


def _decoder(entry: TensorEntry, file: PositionedFile) -> Any:
    block, block_bytes = GGML_QUANT_SIZES[entry.qtype]
    row_bytes = entry.shape[-1] // block * block_bytes
    inner = entry.n_params // entry.shape[0] // entry.shape[-1]
    if len(entry.shape) == 1:
        raise CheckpointError(file.path, f"{entry.name} is a quantized vector", "get the file again")

    def read_rows(start: int, stop: int) -> NDArray[Any]:
        if not 0 <= start <= stop <= entry.shape[0]:
            raise IndexError(f"rows {start} to {stop} of {entry.name} {list(entry.shape)}")
        raw = np.empty((stop - start) * inner * row_bytes, np.uint8)
        file.read_into(raw.data, entry.offset + start * inner * row_bytes)
        values = quants.dequantize(raw.reshape(-1, row_bytes), entry.qtype)
        return np.asarray(values, np.float32).reshape(stop - start, *entry.shape[1:])

    return read_rows
