"""SentencePiece models that exist as tokenizer.json only, with byte fallback: many Llama 2 fine-tunes."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
from gguf import TokenType

from ...errors import TokenizerError
from .loading import auto_tokenizer
from .special import read_special_tokens

# tokenizer.json has no scores; llama.cpp's converter writes the same for all
_SCORE = -1000.0


def add_llama_hf(writer: gguf.GGUFWriter, folder: Path, n_vocab: int) -> None:
    """Add tokens, scores, types and special tokens (``LlamaHfVocab`` in gguf-py).

    Args:
        writer: takes the keys.
        folder: the checkpoint.
        n_vocab: rows of the embedding.

    Raises:
        TokenizerError: damaged, or with other ids than 0 to the number of tokens.
    """
    tokenizer = auto_tokenizer(folder)
    n_base = int(tokenizer.vocab_size)
    text_of = {token: text for text, token in tokenizer.get_vocab().items()}
    ids = [
        *range(n_base),
        *sorted(token for token in tokenizer.get_added_vocab().values() if token >= n_base),
    ]
    if len(ids) > n_vocab or any(token not in text_of for token in ids):
        raise TokenizerError(
            folder / "tokenizer.json",
            f"{len(ids)} tokens, ids up to {max(text_of, default=-1)}, for an embedding of {n_vocab} rows",
            "download config and tokenizer again",
        )
    special = set(tokenizer.all_special_ids)

    def kind(token: int) -> TokenType:
        if token < n_base and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text_of[token]):
            return TokenType.BYTE
        if token in special:
            return TokenType.CONTROL
        return TokenType.NORMAL if token < n_base else TokenType.USER_DEFINED

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text_of[token].encode("utf-8") for token in ids])
    writer.add_token_scores([_SCORE] * len(ids))
    writer.add_token_types([kind(token) for token in ids])
    read_special_tokens(folder, n_vocab=len(ids)).add_to(writer)
