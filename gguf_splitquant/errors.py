"""Errors that a user can act on.

Every failure that input, disk or environment can cause is a :class:`SplitQuantError` whose message names
the file or tensor, the cause and the next step. The command line prints it as one line and exits with 2;
anything else that reaches the top is a bug and keeps its traceback.
"""

from __future__ import annotations

import os
import re

_MOST = 4000
"""Characters of a message: a path of the longest kind fits, a list of a million numbers does not."""


_TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_HIDDEN = "***"
_SECRETS = (
    # tokens of the hub, what signs a URL, user and password in one
    (re.compile(r"\bhf_\w{8,}"), _HIDDEN),
    (re.compile(r"(https?://[^\s?]+)\?[^\s'\")>]+"), rf"\1?{_HIDDEN}"),
    (re.compile(r"(https?://)[^\s/@]+@"), rf"\1{_HIDDEN}@"),
    (re.compile(r"(?i)\b(bearer |basic |token=)[\w.~+/=-]{12,}"), rf"\1{_HIDDEN}"),
    # paths of requests, as urllib3 prints them
    (re.compile(r"(url: /[^\s?]*)\?\S+"), rf"\1?{_HIDDEN}"),
)


def without_secrets(text: str) -> str:
    """A text without tokens, passwords and the signatures of URLs: what a library says may hold them."""
    for variable in _TOKEN_VARIABLES:
        token = os.environ.get(variable)
        if token and len(token) >= 8:
            text = text.replace(token, _HIDDEN)
    for secret, instead in _SECRETS:
        text = secret.sub(instead, text)
    return text


def printable(text: str) -> str:
    """A text with question marks for what a terminal would obey: names come from files of strangers."""
    return "".join(c if c.isprintable() or c in " \n\t" else "?" for c in text)


class SplitQuantError(Exception):
    """Base of all errors that a user can act on.

    Args:
        subject: what failed: a path, a tensor name, an option.
        cause: what is wrong with it, with the figures that show it.
        fix: the next step, as an imperative. Empty only where there is none.
    """

    def __init__(self, subject: object, cause: str, fix: str = "") -> None:
        self.subject = str(subject)
        self.cause = cause
        self.fix = fix
        message = f"{self.subject}: {cause}" + (f"; {fix}" if fix else "")
        super().__init__(printable(" ".join(without_secrets(message).split()))[:_MOST])


class CheckpointError(SplitQuantError):
    """The checkpoint is missing something, is damaged, or lies about its contents."""


class UnsupportedModelError(SplitQuantError):
    """The checkpoint is sound, but of a kind that this version does not convert."""


class TokenizerError(SplitQuantError):
    """The tokenizer is missing, damaged, or its pre-tokenizer is not known."""


class RecipeError(SplitQuantError):
    """An option, or a combination of options, that has no meaning."""


class OutputError(SplitQuantError):
    """The output cannot be written: it exists, the folder is read-only, the disk is full."""


class GGUFError(SplitQuantError):
    """A GGUF file that is damaged, or whose split tensors do not fit together."""


class BuildError(SplitQuantError):
    """The patched runtime could not be built."""


class EngineError(SplitQuantError):
    """The llama.cpp library is missing, unpatched where the patch is needed, or refused a model."""


class EvaluationError(SplitQuantError):
    """Models, texts or data sets that cannot be compared."""


class VerificationError(SplitQuantError):
    """A file that cannot be compared with its source: what it was made from, or how, is not known."""
