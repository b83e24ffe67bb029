"""Tokenizers of a checkpoint as GGUF keys: which kind it is, and by which reader.

The choice is llama.cpp's: a ``tokenizer.model`` is SentencePiece; else a tokenizer.json with byte fallback is
SentencePiece in other clothes; else it is byte-level BPE.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import TokenizerError
from ..config import read_json_if_there

if TYPE_CHECKING:
    import gguf

# vocabulary sizes by which llama.cpp's converter knows CodeLlama, and Granite and SmolLM
_CODE_LLAMA_VOCAB = 32016
_NO_BOS_VOCAB = 49152
_CODE_LLAMA_IDS = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}


def add_llama_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """Add the tokenizer of a Llama-like checkpoint (``LlamaModel.set_vocab`` in llama.cpp).

    Args:
        writer: takes the keys.
        folder: the checkpoint.
        n_vocab: rows of the embedding.
        pre_tokenizer: llama.cpp's name of the BPE pre-tokenizer; None finds it by its hash.

    Raises:
        TokenizerError: missing, damaged, or of a kind that is not known.
    """
    from .special import read_special_tokens

    if (folder / "tekken.json").is_file() and not (folder / "tokenizer.json").is_file():
        raise TokenizerError(
            folder / "tekken.json",
            "a tokenizer in Mistral's own format",
            "add the tokenizer.json that Mistral publishes for transformers",
        )
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    if isinstance(config.get("add_prefix_space"), bool):
        writer.add_add_space_prefix(config["add_prefix_space"])
    if (folder / "tokenizer.model").is_file():
        _add_sentencepiece(writer, folder, n_vocab, pre_tokenizer)
    elif _has_byte_fallback(folder):
        _refuse_pre_tokenizer(folder / "tokenizer.json", pre_tokenizer)
        from .llama_hf import add_llama_hf

        add_llama_hf(writer, folder, n_vocab)
    else:
        _add_bpe(writer, folder, n_vocab, pre_tokenizer)
    if n_vocab == _CODE_LLAMA_VOCAB:
        infill = read_special_tokens(folder, kinds=tuple(_CODE_LLAMA_IDS))
        for kind, token in _CODE_LLAMA_IDS.items():
            infill.ids.setdefault(kind, token)
        infill.add_to(writer)
    if n_vocab == _NO_BOS_VOCAB:
        writer.add_add_bos_token(False)


def add_qwen2_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """As :func:`add_llama_tokenizer`, for Qwen2 (``Qwen2Model.set_vocab`` in llama.cpp)."""
    if (folder / "tokenizer.model").is_file():
        _add_sentencepiece(writer, folder, n_vocab, pre_tokenizer)
    else:
        _add_bpe(writer, folder, n_vocab, pre_tokenizer)


def add_bpe_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """As :func:`add_llama_tokenizer`, for families with byte-level BPE only (``_set_vocab_gpt2``)."""
    _add_bpe(writer, folder, n_vocab, pre_tokenizer)


def add_gemma_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """As :func:`add_llama_tokenizer`, for Gemma: SentencePiece, no space before the text."""
    if not (folder / "tokenizer.model").is_file():
        raise TokenizerError(
            folder,
            "no tokenizer.model, without which llama.cpp cannot merge tokens in the right order",
            "add that of the Gemma which the checkpoint was made from",
        )
    _add_sentencepiece(writer, folder, n_vocab, pre_tokenizer)
    writer.add_add_space_prefix(False)


def add_phi3_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """As :func:`add_llama_tokenizer`, for Phi-3 and Phi-4 (``Phi3MiniModel.set_vocab`` in llama.cpp)."""
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    sentencepiece = (folder / "tokenizer.model").is_file()
    if config.get("tokenizer_class") == "GPT2Tokenizer" or not (sentencepiece or _has_byte_fallback(folder)):
        _add_bpe(writer, folder, n_vocab, pre_tokenizer)
        return
    if not sentencepiece:
        raise TokenizerError(
            folder,
            "no tokenizer.model, without which llama.cpp cannot merge tokens in the right order",
            "add that of the Phi-3 which the checkpoint was made from",
        )
    _add_sentencepiece(writer, folder, n_vocab, pre_tokenizer, phi3=True)


def add_mamba_tokenizer(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None
) -> None:
    """As :func:`add_llama_tokenizer`, for Mamba: tokenizer.json, where there is one, comes first."""
    if (folder / "tokenizer.json").is_file() or not (folder / "tokenizer.model").is_file():
        _add_bpe(writer, folder, n_vocab, pre_tokenizer)
    else:
        _add_sentencepiece(writer, folder, n_vocab, pre_tokenizer)


def _add_sentencepiece(
    writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None, *, phi3: bool = False
) -> None:
    _refuse_pre_tokenizer(folder / "tokenizer.model", pre_tokenizer)
    from .sentencepiece_model import add_sentencepiece

    add_sentencepiece(writer, folder, n_vocab, phi3=phi3)


def _add_bpe(writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None) -> None:
    from .bpe import add_bpe

    add_bpe(writer, folder, n_vocab, pre_tokenizer)


def _has_byte_fallback(folder: Path) -> bool:
    """Whether tokenizer.json holds a converted SentencePiece model."""
    tokenizer = read_json_if_there(folder / "tokenizer.json") or {}
    model, decoder = tokenizer.get("model"), tokenizer.get("decoder")
    return (
        isinstance(model, dict)
        and model.get("type") == "BPE"
        and model.get("byte_fallback") is True
        and isinstance(decoder, dict)
        and decoder.get("type") == "Sequence"
    )


def _refuse_pre_tokenizer(path: Path, pre_tokenizer: str | None) -> None:
    if pre_tokenizer is not None:
        raise TokenizerError(path, "SentencePiece, which has no pre-tokenizer", "leave out --pre")
