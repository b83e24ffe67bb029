"""Reading float models: the way in.

What comes out is a :class:`~gguf_splitquant.sources.model.SourceModel`.
"""

from __future__ import annotations

from pathlib import Path

from .model import FloatType, SourceModel, SourceTensor, to_float32

__all__ = ["FloatType", "SourceModel", "SourceTensor", "open_model", "to_float32"]


def open_model(path: Path, *, pre_tokenizer: str | None = None) -> SourceModel:
    """Open a Hugging Face checkpoint. Headers, metadata and tokenizer are read, weights are not.

    Args:
        path: folder with config.json, ``*.safetensors`` and the tokenizer's files.
        pre_tokenizer: llama.cpp's name of the BPE pre-tokenizer, where it is not recognized; None detects it.

    Raises:
        CheckpointError: something is missing, damaged, or contradicts itself.
        UnsupportedModelError: a pickle, an already quantized checkpoint, or an architecture that is not
            supported.
        TokenizerError: the tokenizer is missing or damaged, or its pre-tokenizer is not known.
    """
    # gguf, sentencepiece and transformers: a command that reads no checkpoint should not wait for them
    from .huggingface import read_checkpoint

    return read_checkpoint(Path(path), pre_tokenizer)
