"""Normalizers and decoders that rewrite a text: refused where they can blow it up.

Sixty replacements of one letter by two, one behind the other, are a kilobyte of tokenizer.json and more
memory than there is. Published tokenizers replace spaces by a sign of three bytes and the like.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import TokenizerError

_MOST = 10_000
"""Times that a text may grow: the check text then has fifteen million characters."""
_PARTS = ("normalizers", "pretokenizers", "decoders", "processors")


def check_growth(path: Path, description: Mapping[str, Any]) -> None:
    """Raise TokenizerError for a tokenizer.json whose parts can make a text :data:`_MOST` times as long.

    Args:
        path: of the file, for the error.
        description: its content.
    """
    for field in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
        growth = 1
        for part in _parts(description.get(field)):
            growth *= _growth(part)
            if growth > _MOST:
                raise TokenizerError(
                    path,
                    f"its {field} can make a text more than {_MOST:,} times as long",
                    "do not trust this file; download the tokenizer of the original model",
                )


def _parts(node: Any) -> Iterator[Mapping[str, Any]]:
    """The steps of a normalizer and the like, in order; as deep as the JSON is, which is bounded."""
    if not isinstance(node, dict):
        return
    nested = [node[name] for name in _PARTS if isinstance(node.get(name), list)]
    if not nested:
        yield node
    for steps in nested:
        for step in steps:
            yield from _parts(step)


def _growth(part: Mapping[str, Any]) -> int:
    """By what factor a step can lengthen a text: its longest own text in the place of each character."""
    match part.get("type"):
        case "Replace" | "Prepend" | "Metaspace":
            return 1 + max(_bytes(part.get(field)) for field in ("content", "prepend", "replacement"))
        case "Precompiled":
            return 1 + _bytes(part.get("precompiled_charsmap"))
        case "ByteLevel":
            return 2
        case "TemplateProcessing":
            single, tokens = part.get("single"), part.get("special_tokens")
            pieces = len(single) if isinstance(single, list) else 0
            named = tokens.values() if isinstance(tokens, dict) else ()
            ids = [entry.get("ids") for entry in named if isinstance(entry, dict)]
            return 1 + pieces * max((len(i) for i in ids if isinstance(i, list)), default=0)
    # Unicode's normal forms lengthen a text once, however often they are applied
    return 1


def _bytes(text: Any) -> int:
    return len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0
