"""Loading tokenizer.json: with the tokenizers library where the file says it all, else with transformers.

Importing transformers takes seconds, and hundreds of megabytes where torch is installed; tokenizers takes
neither. transformers is asked where the files need its knowledge: tokens that only tokenizer_config.json
lists, old checkpoints without tokenizer.json, tokenizer classes that add BOS by themselves. What it would
invent, default tokens of a class that this vocabulary does not have, stays out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...errors import TokenizerError
from ..config import read_json_if_there

_DOWNLOAD_AGAIN = "download the tokenizer's files again"
_NAMED_TOKENS = tuple(f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, whichever library runs it.

    Attributes:
        ids: id by token text, added tokens included.
        added: added tokens by id.
        encode: text to ids; the flag says whether special tokens are added.
        decode: ids to text, special tokens included.
    """

    ids: Mapping[str, int]
    added: Mapping[int, AddedToken]
    encode: Callable[[str, bool], Sequence[int]]
    decode: Callable[[Sequence[int]], str]


def load_tokenizer(folder: Path) -> LoadedTokenizer:
    """The checkpoint's tokenizer.

    Raises:
        TokenizerError: no tokenizer files, damaged ones, or a tokenizer that needs code of its own.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return load_with_transformers(folder)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    # tokenizers raises a bare Exception, whatever is wrong with the file
    except Exception as error:
        raise TokenizerError(path, f"not a tokenizer ({_first_line(error)})", _DOWNLOAD_AGAIN) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids: dict[str, int] = tokenizer.get_vocab()
    if not _has_all(ids, read_json_if_there(folder / "tokenizer_config.json") or {}):
        return load_with_transformers(folder)
    return LoadedTokenizer(
        ids,
        tokenizer.get_added_tokens_decoder(),
        lambda text, special: tokenizer.encode(text, add_special_tokens=special).ids,
        lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False)),
    )


def load_with_transformers(folder: Path) -> LoadedTokenizer:
    """As :func:`load_tokenizer`, always with transformers."""
    tokenizer = auto_tokenizer(folder)
    return LoadedTokenizer(
        tokenizer.get_vocab(),
        tokenizer.added_tokens_decoder,
        lambda text, special: list(tokenizer.encode(text, add_special_tokens=special)),
        lambda tokens: str(tokenizer.decode(list(tokens))),
    )


def auto_tokenizer(folder: Path) -> Any:
    """What transformers' ``AutoTokenizer`` makes of local files, without running code of the checkpoint's.

    Raises:
        TokenizerError: as :func:`load_tokenizer`.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise TokenizerError(
            folder, "neither tokenizer.model, tokenizer.json nor vocab.json", "download the tokenizer's files"
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # whatever comes out of transformers here is about these files
    except Exception as error:
        raise TokenizerError(
            folder, f"transformers cannot load the tokenizer ({_first_line(error)})", _DOWNLOAD_AGAIN
        ) from error


def _has_all(ids: Mapping[str, int], config: Mapping[str, Any]) -> bool:
    """Whether every token that tokenizer_config.json names is in the vocabulary, under the same id."""
    listed = config.get("added_tokens_decoder")
    if isinstance(listed, dict):
        for token, entry in listed.items():
            if not isinstance(entry, dict) or str(ids.get(entry.get("content", ""))) != token:
                return False
    for name in _NAMED_TOKENS:
        named = config.get(name)
        text = named.get("content") if isinstance(named, dict) else named
        if isinstance(text, str) and text and text not in ids:
            return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
