"""All metadata of a GGUF file with its types, the vocabulary too: what a new file takes over from an old one.

:func:`.header.read_header` answers questions and steps over the vocabulary; here nothing is left out, and
strings that are not UTF-8 (vocabularies have them) stay the bytes that they are.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from gguf import GGUFValue, GGUFValueType

from ..bounded import open_regular
from ..errors import GGUFError
from .header import SCALARS, HeaderWalker


def read_pairs(path: Path) -> dict[str, GGUFValue]:
    """Key-value pairs of a GGUF file (of the first shard, where there are several), in file order.

    Raises:
        GGUFError: the file cannot be read, is not GGUF, or is damaged.
    """
    try:
        with open_regular(path) as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _PairWalker(path, data).pairs()
    except (OSError, ValueError) as error:
        raise GGUFError(path, f"cannot be read: {error}", "give the path of a GGUF file") from error


def item_type(values: list[Any]) -> GGUFValueType | None:
    """What gguf-py takes the items of an array for; None: they differ. Raises ValueError for no values."""
    one_of_each = dict(zip(map(type, values), values, strict=True)).values()
    found = {GGUFValueType.get_type(value) for value in one_of_each}
    return found.pop() if len(found) == 1 else None


class _PairWalker(HeaderWalker):
    def pairs(self) -> dict[str, GGUFValue]:
        _, n_pairs = self.begin()
        found: dict[str, GGUFValue] = {}
        for _ in range(n_pairs):
            key, kind = self._name(), self._type()
            if key in found:
                raise self._damaged(f"has {key[:200]} twice")
            if kind is GGUFValueType.ARRAY:
                item_kind, length = self.array_head(key)
                found[key] = GGUFValue(self._items(item_kind, length), kind, item_kind)
            else:
                found[key] = GGUFValue(self._one(kind), kind)
        return found

    def _items(self, kind: GGUFValueType, length: int) -> list[Any]:
        if kind is GGUFValueType.STRING:
            return [self._text() for _ in range(length)]
        form = SCALARS[kind]
        raw = self._take(length * struct.calcsize(form))
        return [item for (item,) in struct.iter_unpack(form, raw)]

    def _one(self, kind: GGUFValueType) -> Any:
        return self._text() if kind is GGUFValueType.STRING else self._number(SCALARS[kind])

    def _text(self) -> str | bytes:
        raw = self._take(self._number("<Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return raw
