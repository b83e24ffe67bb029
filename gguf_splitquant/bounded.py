"""Reading small files from strangers: never a device or a pipe, never more than a limit, never too deep.

Everything that is read whole (JSON, texts) passes here. A limit stands before each allocation: the size
before the bytes, the number of parts and their depth before the JSON is taken apart, since a part costs up to
a hundred times its own bytes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MiB = 1 << 20
MAX_TEXT_BYTES = 64 * MiB
"""Of configs, indexes, plans and texts; the largest index of a published checkpoint has 10 MB."""
MAX_JSON_PARTS = 2_000_000
"""Objects, lists and commas: a safetensors header of 200,000 tensors has as many."""
MAX_DEPTH = 100

_OPENING, _CLOSING, _COMMA, _QUOTE = b"[{", b"]}", b",", b'"'
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F][0-9a-fA-F]{2}")
_SURROGATE_PAIR = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}")


def open_descriptor(path: Path) -> int:
    """Open a file for reading, links followed. Raises OSError, also for what is no ordinary file."""
    # without O_NONBLOCK a named pipe would wait for a writer
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not an ordinary file", str(path))


def open_regular(path: Path) -> BinaryIO:
    """As :func:`open_descriptor`, as a binary file."""
    return os.fdopen(open_descriptor(path), "rb")


def read_bytes(path: Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """The content of a file. Raises OSError, and ValueError where it is longer than ``most`` bytes."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"longer than {most:,} bytes")
    return content


def read_text(path: Path, most: int = MAX_TEXT_BYTES) -> str:
    """As :func:`read_bytes`, as UTF-8. Raises UnicodeDecodeError, a ValueError, where it is not."""
    return read_bytes(path, most).decode("utf-8")


def parse_json(
    raw: bytes,
    most_parts: int = MAX_JSON_PARTS,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
) -> Any:
    """The value in a JSON text in UTF-8.

    Args:
        raw: the text.
        most_parts: objects, lists and commas that are taken apart.
        object_pairs_hook: see :func:`json.loads`.

    Raises:
        ValueError: not JSON, too many parts, nested deeper than :data:`MAX_DEPTH`, or a text in it is not
            valid Unicode.
    """
    _check_structure(raw, most_parts)
    _check_surrogates(raw)
    return json.loads(raw.decode("utf-8"), object_pairs_hook=object_pairs_hook)


def _check_surrogates(raw: bytes) -> None:
    """Refuse escapes of half a character: Python makes a text of them that no file can hold."""
    if _SURROGATE.search(raw):
        # an escaped backslash begins no other escape
        found = _SURROGATE.search(_SURROGATE_PAIR.sub(b" ", raw.replace(b"\\\\", b" ")))
        if found:
            raise ValueError(f"{found[0].decode()} is half a character, not valid Unicode")


def _check_structure(raw: bytes, most_parts: int) -> None:
    """Count parts and depth outside of strings, without a Python object for any of them."""
    if b"\\" in raw:
        # escaped quotes end no string
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    kinds = np.zeros(256, np.int8)
    for signs, kind in ((_OPENING, 1), (_CLOSING, -1), (_COMMA, 2), (_QUOTE, 3)):
        kinds[list(signs)] = kind
    parts = depth = 0
    in_string = np.uint8(0)
    for start in range(0, len(raw), MiB):
        signs_here = kinds[np.frombuffer(raw, np.uint8, min(MiB, len(raw) - start), start)]
        # quotes so far, modulo 256: odd is inside of a string
        quotes = np.cumsum(signs_here == 3, dtype=np.uint8) + in_string
        in_string = quotes[-1] & np.uint8(1)
        outside = signs_here[(quotes & np.uint8(1)) == 0]
        parts += int(np.count_nonzero((outside == 1) | (outside == 2)))
        if parts > most_parts:
            raise ValueError(f"more than {most_parts:,} parts")
        steps = outside[np.abs(outside) == 1]
        if len(steps):
            depths = depth + np.cumsum(steps, dtype=np.int64)
            if depths.max() > MAX_DEPTH:
                raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
            depth = int(depths[-1])
