"""Loading tokenizer.json: with the tokenizers library where the file says it all, else with transformers.

Importing transformers takes seconds, and hundreds of megabytes where torch is installed; tokenizers takes
neither. transformers is asked where the files need its knowledge: tokens that only tokenizer_config.json
lists, and old checkpoints without tokenizer.json. What it would invent, default tokens of a class that this
vocabulary does not have, stays out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ...errors import TokenizerError
from ..config import read_json, read_json_if_there
from .growth import check_growth
from .sizes import check_files
from .special import KINDS

_DOWNLOAD_AGAIN = "download the tokenizer's files again"


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer, whichever library runs it.

    Attributes:
        ids: id by token text, added tokens included.
        n_base: tokens of the model itself.
        added: added tokens by id; some may be among the model's own.
        named_ids: of the tokens that tokenizer_config.json gives a role (BOS, ...).
        encode: text to ids; the flag says whether special tokens are added.
        decode: ids to text, special tokens included.
    """

    ids: Mapping[str, int]
    n_base: int
    added: Mapping[int, AddedToken]
    named_ids: frozenset[int]
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
    tokenizer = tokenizer_of(path, read_json(path))
    ids: dict[str, int] = tokenizer.get_vocab()
    config = read_json_if_there(folder / "tokenizer_config.json") or {}
    named = _named_tokens(config)
    if not ids.keys() >= named or not _has_listed(ids, config):
        return load_with_transformers(folder)
    return LoadedTokenizer(
        ids,
        tokenizer.get_vocab_size(with_added_tokens=False),
        tokenizer.get_added_tokens_decoder(),
        frozenset(ids[text] for text in named),
        lambda text, special: encode(path, tokenizer, text, special=special),
        lambda tokens: _decode(path, tokenizer, tokens),
    )


def tokenizer_of(path: Path, description: Mapping[str, Any]) -> Tokenizer:
    """What the content of a tokenizer.json describes; it neither cuts texts nor fills them up.

    Raises:
        TokenizerError: it describes none, or one that blows texts up.
    """
    check_growth(path, description)
    with _tokenizer_errors(path):
        tokenizer = Tokenizer.from_str(json.dumps(description))
        tokenizer.no_truncation()
        tokenizer.no_padding()
    return tokenizer


def encode(path: Path, tokenizer: Tokenizer, text: str, *, special: bool) -> list[int]:
    """Ids of a text. Raises TokenizerError where the tokenizer (of ``path``) fails."""
    with _tokenizer_errors(path):
        ids: list[int] = tokenizer.encode(text, add_special_tokens=special).ids
    return ids


def _decode(path: Path, tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    with _tokenizer_errors(path):
        return str(tokenizer.decode(list(tokens), skip_special_tokens=False))


@contextmanager
def _tokenizer_errors(path: Path) -> Iterator[None]:
    """tokenizers raises a bare Exception, whatever is wrong with a file, and panics where it did not look."""
    try:
        yield
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise TokenizerError(path, f"not a tokenizer ({_first_line(error)})", _DOWNLOAD_AGAIN) from error


def load_with_transformers(folder: Path) -> LoadedTokenizer:
    """As :func:`load_tokenizer`, always with transformers."""
    tokenizer = _auto_tokenizer(folder)

    def encoded(text: str, special: bool) -> list[int]:
        with _tokenizer_errors(folder):
            return list(tokenizer.encode(text, add_special_tokens=special))

    def decoded(tokens: Sequence[int]) -> str:
        with _tokenizer_errors(folder):
            return str(tokenizer.decode(list(tokens)))

    with _tokenizer_errors(folder):
        return LoadedTokenizer(
            tokenizer.get_vocab(),
            int(tokenizer.vocab_size),
            tokenizer.added_tokens_decoder,
            frozenset(tokenizer.all_special_ids),
            encoded,
            decoded,
        )


def _auto_tokenizer(folder: Path) -> Any:
    """What transformers makes of local files, without running code of the checkpoint's."""
    check_growth(folder / "tokenizer.json", read_json_if_there(folder / "tokenizer.json") or {})
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise TokenizerError(
            folder, "neither tokenizer.model, tokenizer.json nor vocab.json", "download the tokenizer's files"
        )
    check_files(folder)
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    # whatever comes out of transformers here is about these files
    except BaseException as error:
        if not _is_failure(error):
            raise
        raise TokenizerError(
            folder, f"transformers cannot load the tokenizer ({_first_line(error)})", _DOWNLOAD_AGAIN
        ) from error


def _has_listed(ids: Mapping[str, int], config: Mapping[str, Any]) -> bool:
    """Whether the added tokens of tokenizer_config.json are in the vocabulary, under the same ids."""
    listed = config.get("added_tokens_decoder")
    return not isinstance(listed, dict) or all(
        isinstance(entry, dict) and str(ids.get(entry.get("content", ""))) == token
        for token, entry in listed.items()
    )


def _named_tokens(config: Mapping[str, Any]) -> set[str]:
    """Texts of the tokens that tokenizer_config.json gives a role."""
    named = [config.get(f"{kind}_token") for kind in KINDS]
    for field in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(field)
        named += more if isinstance(more, list) else more.values() if isinstance(more, dict) else ()
    texts = (token.get("content") if isinstance(token, dict) else token for token in named)
    return {text for text in texts if isinstance(text, str) and text}


def _is_failure(error: BaseException) -> bool:
    # what a panic becomes is no Exception, and its class cannot be imported
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
