"""How tokens are marked, the same for every kind of tokenizer."""

from __future__ import annotations

_CONTROL_TOKENS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
_CONTROL_BRACKETS = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))  # \uff5c: DeepSeek's wide bar


def looks_special(token: str) -> bool:
    """Whether an added token is a control token, though its checkpoint does not mark it as special.

    The names are those of ``TextModel.does_token_look_special`` in llama.cpp: command-r, deepseek and gemma
    checkpoints mark theirs wrongly.
    """
    return token in _CONTROL_TOKENS or any(
        token.startswith(left) and token.endswith(right) for left, right in _CONTROL_BRACKETS
    )


def plain_spaces(token: str) -> str:
    """SentencePiece's visible space as a space: llama.cpp takes user-defined tokens as already normalized."""
    return token.replace("\u2581", " ")
