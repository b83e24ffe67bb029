"""Byte-level BPE: Llama 3, Qwen2, SmolLM2."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType

from ...errors import TokenizerError
from ..config import read_json_if_there
from ..official import official_command
from .loading import LoadedTokenizer, encode, load_tokenizer, tokenizer_of
from .pre_tokenizer import PreTokenizers
from .special import read_special_tokens
from .token_types import looks_special, plain_spaces


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
            f"let llama.cpp's converter read it: {official_command(folder)}",
        )
    known = PreTokenizers.load()
    if pre_tokenizer is not None:
        known.check_name(pre_tokenizer)
    tokenizer = load_tokenizer(folder)
    largest = max(tokenizer.ids.values(), default=-1)
    if largest >= n_vocab:
        raise TokenizerError(
            path,
            f"has a token id {largest}, the embedding {n_vocab} rows",
            "download config and tokenizer again",
        )
    name = pre_tokenizer or detect_pre_tokenizer(
        known, tokenizer, read_json_if_there(folder / "tokenizer_config.json") or {}
    )
    if name is None:
        raise known.unknown(path, description, _name_without_added_tokens(path, known, description))
    tokens, types = _tokens(tokenizer, n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    read_special_tokens(folder, merges=True).add_to(writer)


def detect_pre_tokenizer(
    known: PreTokenizers, tokenizer: LoadedTokenizer, config: Mapping[str, Any]
) -> str | None:
    """The name of a tokenizer's pre-tokenizer, by the hash of the tokens that it makes of the check text.

    Some tokenizer classes of transformers 4, under which the hashes were taken, put BOS first where
    tokenizer_config.json asks for it, whatever tokenizer.json says; other versions and classes do not.

    Args:
        known: the table.
        tokenizer: the checkpoint's.
        config: its tokenizer_config.json.
    """
    tokens = list(tokenizer.encode(known.check_text, True))
    name = known.name_of(tokens)
    if name is None and config.get("add_bos_token") is True:
        bos = config.get("bos_token")
        text = bos.get("content") if isinstance(bos, dict) else bos
        if isinstance(text, str) and text in tokenizer.ids:
            name = known.name_of([tokenizer.ids[text], *tokens])
    return name


def _name_without_added_tokens(
    path: Path, known: PreTokenizers, description: Mapping[str, Any]
) -> str | None:
    """The name that a tokenizer.json had before somebody added tokens to it; None where that is not it."""
    if not description.get("added_tokens"):
        return None
    try:
        bare = tokenizer_of(path, {**description, "added_tokens": []})
        return known.name_of(encode(path, bare, known.check_text, special=True))
    # it is only a hint that is lost
    except TokenizerError:
        return None


def _tokens(tokenizer: LoadedTokenizer, n_vocab: int) -> tuple[list[str], list[TokenType]]:
    text_of = {token: text for text, token in tokenizer.ids.items()}
    tokens: list[str] = []
    types: list[TokenType] = []
    for token in range(n_vocab):
        text = text_of.get(token)
        added = tokenizer.added.get(token)
        kind = TokenType.NORMAL
        if text is None:
            text, kind = f"[PAD{token}]", TokenType.UNUSED
        elif added is not None:
            if not added.normalized:
                # llama.cpp takes these as already normalized
                text = tokenizer.decode(tokenizer.encode(text, False))
            if added.special or looks_special(text):
                kind = TokenType.CONTROL
            else:
                text, kind = plain_spaces(text), TokenType.USER_DEFINED
        tokens.append(text)
        types.append(kind)
    return tokens, types
