"""Byte-level BPE: Llama 3, Qwen2, SmolLM2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ...errors import TokenizerError
from ..config import read_json_if_there
from .pre_tokenizer import PreTokenizers
from .special import read_special_tokens
from .token_types import looks_special, plain_spaces
from .transformers_tokenizer import load_tokenizer


def add_bpe(writer: gguf.GGUFWriter, folder: Path, n_vocab: int, pre_tokenizer: str | None = None) -> None:
    """Add tokens, types, merges, pre-tokenizer and special tokens (``get_vocab_base`` in llama.cpp).

    Args:
        writer: takes the keys.
        folder: the checkpoint.
        n_vocab: rows of the embedding; ids without a token become ``[PAD...]``.
        pre_tokenizer: llama.cpp's name for it; None finds it by its hash.

    Raises:
        TokenizerError: damaged, not BPE, more tokens than the embedding has rows, or a pre-tokenizer that
            llama.cpp does not know.
    """
    path = folder / "tokenizer.json"
    description = read_json_if_there(path) or {}
    model = description.get("model")
    kind = model.get("type") if isinstance(model, dict) else None
    if description and kind not in ("BPE", None):
        raise TokenizerError(
            path,
            f"a {str(kind)[:60]} tokenizer: byte-level BPE and SentencePiece are supported",
            "convert with llama.cpp's convert_hf_to_gguf.py",
        )
    known = PreTokenizers.load()
    if pre_tokenizer is not None:
        known.check_name(pre_tokenizer)
    tokenizer = load_tokenizer(folder)
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= n_vocab:
        raise TokenizerError(
            path,
            f"has a token id {largest}, the embedding {n_vocab} rows",
            "download config and tokenizer again",
        )
    if pre_tokenizer is None:
        pre_tokenizer = known.detect(tokenizer.encode(known.check_text), description, path)
    tokens, types = _tokens(tokenizer, vocabulary, n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    read_special_tokens(folder, merges=True).add_to(writer)


def _tokens(tokenizer: Any, vocabulary: dict[str, int], n_vocab: int) -> tuple[list[str], list[TokenType]]:
    text_of = {token: text for text, token in vocabulary.items()}
    added = tokenizer.get_added_vocab()
    added_by_id = tokenizer.added_tokens_decoder
    tokens: list[str] = []
    types: list[TokenType] = []
    for token in range(n_vocab):
        text = text_of.get(token)
        if text is None:
            tokens.append(f"[PAD{token}]")
            types.append(TokenType.UNUSED)
            continue
        kind = TokenType.NORMAL
        if text in added:
            if not added_by_id[token].normalized:
                # llama.cpp takes these as already normalized
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            if added_by_id[token].special or looks_special(text):
                kind = TokenType.CONTROL
            else:
                text, kind = plain_spaces(text), TokenType.USER_DEFINED
        tokens.append(text)
        types.append(kind)
    return tokens, types
