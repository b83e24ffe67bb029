"""Reading float models: the way in.

What comes out is a :class:`~gguf_splitquant.sources.model.SourceModel`.
"""

from __future__ import annotations

from pathlib import Path

from .model import FloatType, SourceModel, SourceTensor, to_float32

__all__ = ["FloatType", "SourceModel", "SourceTensor", "open_model", "to_float32"]


def open_model(
    path: Path, *, pre_tokenizer: str | None = None, allow_requantize: bool = False
) -> SourceModel:
    """Open a Hugging Face checkpoint or a GGUF file: headers, metadata and tokenizer; no weights are read.

    Args:
        path: folder with config.json, ``*.safetensors`` and the tokenizer's files; or a GGUF file in F32, F16
            or BF16, of several shards the first.
        pre_tokenizer: llama.cpp's name of the BPE pre-tokenizer, where it is not recognized; None detects it.
        allow_requantize: also take a GGUF file that is quantized; the model's notes name the loss.

    Raises:
        GGUFError: the GGUF file is damaged, or a shard is missing.
        CheckpointError: something is missing, damaged, or contradicts itself.
        UnsupportedModelError: a pickle, an already quantized checkpoint, or an architecture that is not
            supported.
        TokenizerError: the tokenizer is missing or damaged, or its pre-tokenizer is not known.
    """
    # gguf, sentencepiece and transformers: a command that reads no checkpoint should not wait for them
    from .gguf_file import is_gguf, read_gguf
    from .huggingface import read_checkpoint

    path = Path(path)
    if is_gguf(path):
        return read_gguf(path, pre_tokenizer, allow_requantize=allow_requantize)
    return read_checkpoint(path, pre_tokenizer)
