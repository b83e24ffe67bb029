"""SentencePiece models that exist as tokenizer.json only, with byte fallback: many Llama 2 fine-tunes."""

from __future__ import annotations

import re
from pathlib import Path

import gguf
from gguf import TokenType

from ...errors import TokenizerError
from ..config import read_json_if_there
from .loading import load_tokenizer, load_with_transformers
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
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    # what the config leaves out, transformers' class for it fills in
    complete = all(config.get(f"{kind}_token") for kind in ("bos", "eos", "unk"))
    tokenizer = load_tokenizer(folder) if complete else load_with_transformers(folder)
    n_base = tokenizer.n_base
    text_of = {token: text for text, token in tokenizer.ids.items()}
    ids = [*range(n_base), *sorted(token for token in tokenizer.added if token >= n_base)]
    if len(ids) > n_vocab or any(token not in text_of for token in ids):
        raise TokenizerError(
            folder / "tokenizer.json",
            f"{len(ids)} tokens, ids up to {max(text_of, default=-1)}, for an embedding of {n_vocab} rows",
            "download config and tokenizer again",
        )

    def kind(token: int) -> TokenType:
        if token < n_base and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", text_of[token]):
            return TokenType.BYTE
        if token in tokenizer.named_ids:
            return TokenType.CONTROL
        return TokenType.NORMAL if token < n_base else TokenType.USER_DEFINED

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([text_of[token].encode("utf-8") for token in ids])
    writer.add_token_scores([_SCORE] * len(ids))
    writer.add_token_types([kind(token) for token in ids])
    read_special_tokens(folder, n_vocab=len(ids)).add_to(writer)
