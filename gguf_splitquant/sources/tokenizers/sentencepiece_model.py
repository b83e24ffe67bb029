"""SentencePiece models (``tokenizer.model``): Llama 1 and 2, Mistral, TinyLlama."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from sentencepiece import SentencePieceProcessor

from ...errors import TokenizerError
from ..config import read_json_if_there
from .sizes import read_model
from .special import read_special_tokens
from .token_types import looks_special, plain_spaces

_ADDED_SCORE = -1000.0
_UNUSED_SCORE = -10000.0


def add_sentencepiece(writer: gguf.GGUFWriter, folder: Path, n_vocab: int, *, phi3: bool = False) -> None:
    """Add tokens, scores, types and special tokens (``_create_vocab_sentencepiece`` in llama.cpp).

    Args:
        writer: takes the keys.
        folder: holds ``tokenizer.model`` and perhaps added tokens.
        n_vocab: rows of the embedding; the vocabulary is filled up or cut to it.
        phi3: added tokens as ``Phi3MiniModel.set_vocab`` reads them: those of tokenizer.json too, and as they
            are spelled and marked.

    Raises:
        TokenizerError: the model or a list of added tokens is damaged.
    """
    path = folder / "tokenizer.model"
    model = _load(path)
    tokens = [f"[PAD{i}]".encode() for i in range(n_vocab)]
    scores = [_UNUSED_SCORE] * n_vocab
    types = [TokenType.UNUSED] * n_vocab
    for token in range(min(model.vocab_size(), n_vocab)):
        tokens[token] = _piece(path, model, token)
        scores[token] = model.GetScore(token)
        types[token] = _type(model, token)

    for text, token in _added_tokens(folder / "added_tokens.json", n_vocab):
        tokens[token], scores[token], types[token] = text.encode(), _ADDED_SCORE, TokenType.USER_DEFINED
    listed = _decoder_tokens(folder / "tokenizer_config.json", n_vocab)
    if phi3:
        listed += _json_tokens(folder / "tokenizer.json", n_vocab)
    for text, token, special in listed:
        if special or (looks_special(text) and not phi3):
            types[token] = TokenType.CONTROL
        else:
            types[token] = TokenType.USER_DEFINED
            text = text if phi3 else plain_spaces(text)
        tokens[token], scores[token] = text.encode(), _ADDED_SCORE

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    read_special_tokens(folder, n_vocab=n_vocab).add_to(writer)


def _load(path: Path) -> Any:
    model = SentencePieceProcessor()
    content = read_model(path)
    try:
        model.LoadFromSerializedProto(content)
    except RuntimeError as error:
        raise TokenizerError(
            path,
            "not a SentencePiece model",
            "download it again, or remove it if the checkpoint's tokenizer is tokenizer.json",
        ) from error
    return model


def _piece(path: Path, model: Any, token: int) -> bytes:
    try:
        piece: str = model.IdToPiece(token)
        return piece.encode("utf-8")
    except UnicodeError as error:
        raise TokenizerError(path, f"token {token} is not UTF-8", "download it again") from error


def _type(model: Any, token: int) -> TokenType:
    if model.IsUnknown(token):
        return TokenType.UNKNOWN
    if model.IsControl(token):
        return TokenType.CONTROL
    if model.IsUnused(token):
        return TokenType.UNUSED
    if model.IsByte(token):
        return TokenType.BYTE
    return TokenType.NORMAL


def _added_tokens(path: Path, n_vocab: int) -> list[tuple[str, int]]:
    added = read_json_if_there(path) or {}
    return [(text, token) for text, token in added.items() if _is_id(path, token, n_vocab)]


def _decoder_tokens(path: Path, n_vocab: int) -> list[tuple[str, int, bool]]:
    added = (read_json_if_there(path) or {}).get("added_tokens_decoder") or {}
    if not isinstance(added, dict):
        raise TokenizerError(path, "added_tokens_decoder is not an object", "download it again")
    found = []
    for key, entry in added.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 20 and isinstance(entry, dict)):
            raise TokenizerError(path, f"added_tokens_decoder has an entry {key[:60]!r}", "download it again")
        content = entry.get("content")
        if not isinstance(content, str):
            raise TokenizerError(
                path, f"added_tokens_decoder: token {key[:60]} has no content", "download it again"
            )
        if _is_id(path, int(key), n_vocab):
            found.append((content, int(key), bool(entry.get("special"))))
    return found


def _json_tokens(path: Path, n_vocab: int) -> list[tuple[str, int, bool]]:
    added = (read_json_if_there(path) or {}).get("added_tokens") or []
    found = []
    for entry in added if isinstance(added, list) else [None]:
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise TokenizerError(path, "added_tokens is not a list of tokens", "download it again")
        if _is_id(path, entry.get("id"), n_vocab):
            found.append((entry["content"], entry["id"], bool(entry.get("special"))))
    return found


def _is_id(path: Path, token: Any, n_vocab: int) -> bool:
    """Whether ``token`` is in the vocabulary; ids beyond it are ignored, as llama.cpp does."""
    if type(token) is not int or token < 0:
        raise TokenizerError(path, f"{str(token)[:60]} is not a token id", "download it again")
    return token < n_vocab
