"""A Hugging Face checkpoint folder: which files there are, and whether they belong together.

Everything that can be wrong with a download is found here, before a family looks at a tensor: missing shards,
an index that names other tensors than the shards hold, weights in a pickle, weights already quantized.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UnsupportedModelError
from .config import ModelConfig, read_json
from .official import official_command
from .safetensors import SafetensorsFile, StoredTensor

INDEX_NAME = "model.safetensors.index.json"

_PICKLE_PATTERNS = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")

_LONGEST_NAME = 255
"""In bytes, on most file systems."""

# tensor name endings that only quantized checkpoints have, and who writes them
_QUANTIZED_SUFFIXES = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".g_idx": "GPTQ",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes (LLM.int8)",
    ".weight_packed": "compressed-tensors",
    ".weight_shape": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8 or compressed-tensors",
    ".input_scale": "fp8",
    ".scales": "a quantizer",
    "_blocks": "mxfp4",
}
# older quantizers leave the method out of config.json and write a file of their own
_QUANTIZER_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "ModelOpt",
}


@dataclass(frozen=True)
class Checkpoint:
    """A float checkpoint in safetensors, complete, with every header checked.

    Attributes:
        folder: the checkpoint.
        config: ``config.json``.
        architecture: Hugging Face's name, such as ``LlamaForCausalLM``.
        tensors: by checkpoint name, shard by shard and by name within a shard: the order in which llama.cpp's
            converter meets them.
    """

    folder: Path
    config: ModelConfig
    architecture: str
    tensors: Mapping[str, StoredTensor]


def open_checkpoint(folder: Path, supported: Iterable[str]) -> Checkpoint:
    """Open the checkpoint in ``folder``; no weights are read.

    Args:
        folder: with config.json and the safetensors files.
        supported: names of the architectures that can be converted.

    Raises:
        CheckpointError: something is missing, damaged, or contradicts itself.
        UnsupportedModelError: weights in a pickle, already quantized, or of another architecture.
    """
    _check_is_folder(folder)
    config, architecture = check_config(folder, supported)
    tensors = _read_shards(folder)
    _refuse_quantized_tensors(folder, tensors)
    return Checkpoint(folder, config, architecture, tensors)


def check_config(folder: Path, supported: Iterable[str]) -> tuple[ModelConfig, str]:
    """``config.json`` and the architecture in it, without a look at the weights; errors as above."""
    config = ModelConfig(read_json(folder / "config.json"), folder / "config.json")
    _refuse_quantized_config(folder, config)
    return config, _architecture(config, supported)


def _check_is_folder(folder: Path) -> None:
    if folder.is_dir():
        files = sorted(folder.glob("*.gguf"))
        if files and not (folder / "config.json").exists():
            cause = f"no checkpoint, but GGUF files ({files[0].name}{_and_more(files)})"
            raise CheckpointError(folder, cause, f"give the file: {files[0]}")
        return
    if not folder.exists():
        raise CheckpointError(
            folder, "no such folder", "give a folder with config.json and *.safetensors files"
        )
    if any(folder.match(pattern) for pattern in _PICKLE_PATTERNS):
        raise _pickle_error(folder)
    raise CheckpointError(
        folder,
        "neither a GGUF file nor a checkpoint",
        "give the folder that holds config.json and *.safetensors",
    )


def _architecture(config: ModelConfig, supported: Iterable[str]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(
            config.path, "no list 'architectures'", "download the checkpoint's own config.json"
        )
    name: str = names[0]
    supported = sorted(supported)
    if name not in supported:
        closest = difflib.get_close_matches(name[:100], supported, n=2, cutoff=0.7)
        like = f"closest: {', '.join(closest)}; " if closest else ""
        raise UnsupportedModelError(
            config.path,
            f"architecture {name[:100]} is not supported ({like}supported: {', '.join(supported)})",
            f"let llama.cpp's converter read it: {official_command(config.path.parent)}",
        )
    return name


def _refuse_quantized_config(folder: Path, config: ModelConfig) -> None:
    for field in ("quantization_config", "compression_config"):
        settings = config.get(field)
        if settings:
            raise _quantized_error(config.path, f"{field} says {_method(settings)}")
    for name, method in _QUANTIZER_FILES.items():
        if (folder / name).is_file():
            raise _quantized_error(folder / name, f"left there by {method}")


def _method(settings: Any) -> str:
    if not isinstance(settings, dict):
        return str(settings)[:60]
    method = settings.get("quant_method") or settings.get("quant_algo")
    if method is None:
        bits_and_bytes = settings.get("load_in_4bit") or settings.get("load_in_8bit")
        return "bitsandbytes" if bits_and_bytes else "no method that is known here"
    bits = settings.get("bits") or settings.get("w_bit")
    return str(method)[:60] + (f", {bits} bits" if isinstance(bits, int) else "")


def _refuse_quantized_tensors(folder: Path, tensors: Mapping[str, StoredTensor]) -> None:
    for name, tensor in tensors.items():
        for suffix, method in _QUANTIZED_SUFFIXES.items():
            if name.endswith(suffix):
                raise _quantized_error(tensor.origin, f"its name ends in {suffix}, as {method} writes it")


def _quantized_error(subject: object, evidence: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        subject,
        f"the checkpoint is already quantized: {evidence}",
        "convert from the original float checkpoint",
    )


def _read_shards(folder: Path) -> dict[str, StoredTensor]:
    index_path = folder / INDEX_NAME
    if not index_path.is_file():
        return dict(SafetensorsFile(_single_file(folder)).tensors)
    shard_of = shards_of_index(index_path)
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(shard_of.values())):
        path = folder / shard
        if not path.is_file():
            raise CheckpointError(path, f"missing, though {INDEX_NAME} names it", "download it")
        for name, tensor in SafetensorsFile(path).tensors.items():
            if shard_of.get(name) != shard:
                place = f"in {shard_of[name]}" if name in shard_of else "nowhere"
                raise CheckpointError(
                    tensor.origin, f"{INDEX_NAME} puts it {place}", "download index and shards again"
                )
            tensors[name] = tensor
    absent = [name for name in shard_of if name not in tensors]
    if absent:
        raise CheckpointError(
            folder / shard_of[absent[0]],
            f"lacks {absent[0]}{_and_more(absent)}, which {INDEX_NAME} puts there",
            "download the shard again",
        )
    return tensors


def shards_of_index(path: Path) -> dict[str, str]:
    """The shard of every tensor. Raises CheckpointError for an index that is damaged or points elsewhere."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not shard_of:
        raise CheckpointError(path, "no map 'weight_map'", "download it again")
    for name, shard in shard_of.items():
        # a bare name: neither a/b nor ../b, on any system, and not longer than systems take
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or set(shard) & set("/\\:\0")
            or len(shard.encode("utf-8")) > _LONGEST_NAME
        ):
            raise CheckpointError(
                path,
                f"{name[:200]} is in {str(shard)[:200]!r}, not a *.safetensors file of this folder",
                "download the index again",
            )
    return shard_of


def _single_file(folder: Path) -> Path:
    files = sorted(folder.glob("model*.safetensors"))
    if len(files) == 1 and "-of-" not in files[0].name:
        return files[0]
    if files:
        raise CheckpointError(
            folder / INDEX_NAME,
            f"not found, but there are shards ({files[0].name}{_and_more(files)})",
            "download it along with the shards",
        )
    pickles = sorted(path for pattern in _PICKLE_PATTERNS for path in folder.glob(pattern))
    if pickles:
        raise _pickle_error(pickles[0])
    if (folder / "adapter_model.safetensors").is_file():
        raise UnsupportedModelError(
            folder / "adapter_model.safetensors",
            "a LoRA adapter, not a model",
            "merge it into its base model first (peft: merge_and_unload)",
        )
    raise CheckpointError(
        folder, "no model*.safetensors file", "download the checkpoint in safetensors format"
    )


def _pickle_error(path: Path) -> UnsupportedModelError:
    return UnsupportedModelError(
        path,
        "a pickle, which can run any code when it is loaded: never opened here",
        "where you trust it, save it as safetensors with transformers: "
        "AutoModelForCausalLM.from_pretrained(FOLDER, dtype='auto').save_pretrained(NEW_FOLDER)",
    )


def _and_more(items: list[Any]) -> str:
    return f" and {len(items) - 1} more" if len(items) > 1 else ""
