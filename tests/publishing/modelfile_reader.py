"""Reads Modelfiles the way Ollama's parser does (parser/parser.go): what it makes of a file counts."""

from __future__ import annotations

COMMANDS = {"from", "license", "template", "system", "adapter", "parameter", "message"}


def read_modelfile(text: str) -> list[tuple[str, str]]:
    """Commands with their arguments; parameters under their own names. ValueError as Ollama refuses."""
    found = []
    at = 0
    while at < len(text):
        if text[at] in " \t\r\n":
            at += 1
        elif text[at] == "#":
            at = (text + "\n").index("\n", at)
        else:
            name, at = word(text, at, str.isalpha)
            if name.lower() not in COMMANDS:
                raise ValueError(f"no command {name!r}")
            if name.lower() == "parameter":
                name, at = word(text, at, lambda c: c.isalnum() or c == "_")
            argument, at = value(text, at)
            found.append((name.lower(), argument))
    if "from" not in dict(found):
        raise ValueError("no FROM line")
    return found


def word(text: str, at: int, belongs) -> tuple[str, int]:
    end = at
    while end < len(text) and belongs(text[end]):
        end += 1
    if end == at or text[end : end + 1] not in (" ", "\t"):
        raise ValueError(f"unexpected {text[end : end + 1]!r}")
    return text[at:end], end + 1


def value(text: str, at: int) -> tuple[str, int]:
    """Up to the first newline where the quotes, if any, are closed; unprintable characters are dropped."""
    taken = ""
    while True:
        character = text[at : at + 1]
        if character in ("", "\n", "\r"):
            done = unquoted(taken.strip())
            if done is not None:
                return done, at
            if not character:
                raise ValueError("the quotes are not closed")
        if character.isprintable() or character in "\n\r\t":
            taken += character
        at += 1


def unquoted(text: str) -> str | None:
    for quote in ('"""', '"'):
        if text.startswith(quote):
            closed = len(text) >= 2 * len(quote) and text.endswith(quote)
            return text[len(quote) : -len(quote)] if closed else None
    return text
