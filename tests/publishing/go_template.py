"""The part of Go's text/template that our Modelfiles use, for machines without Go."""

from __future__ import annotations

import re
from typing import Any

Node = tuple[str, Any, Any, Any]


def execute(source: str, data: dict[str, Any]) -> str:
    """The template's output for ``{"System": text, "Messages": [{"Role": ..., "Content": ...}]}``."""
    pieces = re.split(r"\{\{ (.*?) \}\}", source, flags=re.DOTALL)
    tokens = [("text" if i % 2 == 0 else "action", piece) for i, piece in enumerate(pieces)]
    nodes, rest = parse(tokens)
    assert not rest
    return "".join(write(node, data, data, 0) for node in nodes)


def parse(tokens: list[tuple[str, str]]) -> tuple[list[Node], list[tuple[str, str]]]:
    """Nodes up to an ``end`` or ``else``, which is left."""
    nodes: list[Node] = []
    while tokens:
        (kind, text), tokens = tokens[0], tokens[1:]
        if kind == "text":
            nodes.append(("text", text, None, None))
        elif text in ("end", "else"):
            return nodes, [(kind, text), *tokens]
        elif text.startswith(("range", "if")):
            word, _, what = text.partition(" ")
            body, tokens = parse(tokens)
            closing, tokens = tokens[0][1], tokens[1:]
            other: list[Node] = []
            if closing == "else":
                other, tokens = parse(tokens)
                tokens = tokens[1:]
            nodes.append((word, what, body, other))
        else:
            nodes.append(("value", text, None, None))
    return nodes, tokens


def write(node: Node, root: dict[str, Any], dot: dict[str, Any], index: int) -> str:
    kind, what, body, other = node
    if kind == "text":
        return str(what)
    if kind == "value":
        return value(what, root, dot)
    if kind == "range":
        assert what in (".Messages", "$i, $_ := .Messages")
        return "".join(write(n, root, m, i) for i, m in enumerate(root["Messages"]) for n in body)
    chosen = body if true(what, root, dot, index) else other
    return "".join(write(n, root, dot, index) for n in chosen)


def value(what: str, root: dict[str, Any], dot: dict[str, Any]) -> str:
    if what.startswith('"'):
        return what.strip('"')
    return str(root["System"] if what == "$.System" else dot[what.removeprefix(".")])


def true(what: str, root: dict[str, Any], dot: dict[str, Any], index: int) -> bool:
    if match := re.fullmatch(r'eq \.Role "(\w+)"', what):
        return bool(dot["Role"] == match[1])
    if what == "and (eq $i 1) $.System":
        return index == 1 and bool(root["System"])
    assert what == ".System"
    return bool(root["System"])
