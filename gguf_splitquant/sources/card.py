"""The head of a model card (README.md): YAML from a stranger, measured before gguf-py makes values of it.

YAML takes half a minute for a megabyte; and a value that is named once and used over and over (an alias of
aliases) is small until something writes it out.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import yaml

from ..bounded import MAX_DEPTH, MiB, read_text
from ..errors import CheckpointError
from .config import is_text, shown

_MAX_CARD, _MAX_HEAD = 16 * MiB, MiB // 2
_MAX_VALUES = 200_000
_VALUE_CHARACTERS = 100
"""Of a text: as many more count as another value."""


def check_card(path: Path) -> None:
    """Raise CheckpointError for a card whose head is too long, too deep, or explodes; none is fine."""
    try:
        lines = read_text(path, _MAX_CARD).splitlines() if path.is_file() else []
        # the head as gguf.Metadata.load_model_card finds it
        if lines[:1] != ["---"]:
            return
        head = "\n".join(itertools.takewhile(lambda line: line != "---", lines[1:])) + "\n"
        if len(head) > _MAX_HEAD:
            raise ValueError(f"its head has {len(head):,} characters, and {_MAX_HEAD:,} is the most")
        _check_values(head.replace("\t", "  "))
    except yaml.YAMLError as error:
        cause = f"the model card's head is not valid YAML ({str(error).splitlines()[0]})"
        raise CheckpointError(path, cause, "correct it, or move README.md away") from error
    except (OSError, ValueError, RecursionError) as error:
        cause = f"the model card cannot be read ({error})"
        raise CheckpointError(path, cause, "correct it, or move README.md away") from error


def _check_values(head: str) -> None:
    """Raise ValueError for more values than :data:`_MAX_VALUES` once every alias is written out, and for one
    that is not valid Unicode.
    """
    root = yaml.compose(head, Loader=yaml.SafeLoader)
    sizes: dict[int, int] = {}

    def size(node: yaml.Node | None, depth: int) -> int:
        if node is None:
            return 0
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels, or in itself")
        if id(node) not in sizes:
            if isinstance(node, yaml.ScalarNode) and not is_text(node.value):
                raise ValueError(f"{shown(node.value)} is not valid Unicode")
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            flat = itertools.chain.from_iterable(parts) if isinstance(node, yaml.MappingNode) else parts
            text = 0 if parts else len(node.value) // _VALUE_CHARACTERS
            sizes[id(node)] = 1 + text + sum(size(part, depth + 1) for part in flat)
        return sizes[id(node)]

    if size(root, 0) > _MAX_VALUES:
        raise ValueError(f"more than {_MAX_VALUES:,} values, with its aliases written out")
