"""Into how many files a model goes, and which tensor into which: a matter of sizes alone.

Every machine that makes one of the files comes to the same division, without a word to the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import OutputError, RecipeError
from ..planning.plan import OutputTensor
from .header import shard_path

MOST_SHARDS = 65535
_ENTRY = 64
"""Bytes of a tensor's entry in the header beside its name, at most; padding included."""

_ONLY = re.compile(r"(\d{1,5})/(\d{1,5})", re.ASCII)


@dataclass(frozen=True)
class Shards:
    """How a model is divided into files.

    Attributes:
        most_bytes: size that no file exceeds, unless one tensor alone does.
        count: so many files, of about the same size, instead.
        only: (i, n): write the i-th of n alone, counted from 1. The division is that of ``most_bytes``, which
            must give n files then; else that into n of about the same size.
    """

    most_bytes: int | None = None
    count: int | None = None
    only: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.most_bytes is not None and self.most_bytes < 1:
            raise RecipeError("--max-shard-size", f"{self.most_bytes} bytes", "choose a size, such as 2GB")
        if self.most_bytes is not None and self.count is not None:
            raise RecipeError("--shards", "contradicts --max-shard-size", "give one of them")
        if self.only is not None:
            number, count = self.only
            if not 1 <= number <= count <= MOST_SHARDS:
                raise RecipeError("--shard", f"there is no {number}/{count}", "give 1/N to N/N")
            if self.count not in (None, count):
                cause = f"{number}/{count} is not one of {self.count} files"
                raise RecipeError("--shard", cause, "leave --shards out")
            if self.most_bytes is None:
                object.__setattr__(self, "count", count)
        if self.count is not None and not 1 <= self.count <= MOST_SHARDS:
            raise RecipeError("--shards", f"{self.count} files", f"choose 1 to {MOST_SHARDS}")

    def check(self, found: int) -> None:
        """Raise OutputError unless a division into ``found`` files has the one that is to be written."""
        if found > MOST_SHARDS:
            raise OutputError("--max-shard-size", f"gives {found:,} files", "choose a larger one")
        if self.only is not None and self.only[1] != found:
            cause = f"the division is into {found} files, not {self.only[1]}"
            raise OutputError("--shard", cause, f"give {min(self.only[0], found)}/{found}, or another size")

    @property
    def several(self) -> bool:
        """There may be more than one file, with other names than the one that is asked for."""
        return self.most_bytes is not None or (self.count or 1) > 1

    def target(self, out: Path) -> Path:
        """What a journal is called after: ``out``, or the one file that is written alone."""
        if self.only is None or self.only[1] == 1:
            return out
        return shard_of(out, self.only[0] - 1, self.only[1])


WHOLE = Shards()
"""One file."""


def shard_of(out: Path, number: int, count: int) -> Path:
    """The name of one of several files of ``out``; ``number`` counts from 0."""
    return shard_path(out.with_name(out.name.removesuffix(".gguf")), number, count)


def one_of(text: str) -> tuple[int, int]:
    """``2/4``, the second of four, as numbers. Raises RecipeError for anything else."""
    match = _ONLY.fullmatch(text.strip())
    if match is None:
        raise RecipeError("--shard", f"{text[:40]!r}", "write I/N, such as 2/4: the second of four")
    return int(match[1]), int(match[2])


def shard_groups(
    weights: Sequence[Sequence[OutputTensor]], header: int, shards: Shards
) -> list[tuple[OutputTensor, ...]]:
    """Consecutive tensors for each file.

    Args:
        weights: the tensors that each weight becomes, in file order.
        header: bytes of the model's own metadata, which the first file has.
        shards: by size, where a weight's sub-layers may be divided, or by count, where they are not.
    """
    if shards.count is None:
        assert shards.most_bytes is not None
        single = [(output,) for outputs in weights for output in outputs]
        return _joined(single, _filled([_room(unit) for unit in single], header, shards.most_bytes))
    if shards.count > len(weights):
        raise OutputError(
            "--shards", f"{shards.count:,} files for {len(weights)} tensors", "choose fewer files"
        )
    return _joined(weights, _balanced([_room(unit) for unit in weights], header, shards.count))


def _room(outputs: Sequence[OutputTensor]) -> int:
    """Bytes that tensors take at most: data, entry in the header, name and error among the metadata."""
    return sum(o.nbytes + 2 * len(o.name.encode()) + 3 * _ENTRY for o in outputs)


def _filled(rooms: Sequence[int], header: int, most: int) -> list[int]:
    """Where files begin if each takes as much as fits."""
    starts, size = [0], header + 5 * _ENTRY
    for i, room in enumerate(rooms):
        if i > starts[-1] and size + room > most:
            starts.append(i)
            size = 8 * _ENTRY  # the keys of a shard, and of its errors
        size += room
    return starts


def _balanced(rooms: Sequence[int], header: int, count: int) -> list[int]:
    """Where ``count`` files begin so that the largest is as small as can be."""
    low, high = max(rooms), header + sum(rooms) + 16 * _ENTRY
    while low < high:
        middle = (low + high) // 2
        if len(_filled(rooms, header, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    starts = _filled(rooms, header, low)
    while len(starts) < count:
        # the largest that can be divided, at its middle
        ends = [*starts[1:], len(rooms)]
        spans = [(sum(rooms[a:b]), a, b) for a, b in zip(starts, ends, strict=True) if b - a > 1]
        total, start, end = max(spans, key=lambda span: (span[0], -span[1]))
        cut, before = start + 1, rooms[start]
        while cut < end - 1 and before + rooms[cut] <= total / 2:
            before += rooms[cut]
            cut += 1
        starts = sorted([*starts, cut])
    return starts


def _joined(units: Sequence[Sequence[OutputTensor]], starts: Sequence[int]) -> list[tuple[OutputTensor, ...]]:
    ends = [*starts[1:], len(units)]
    return [
        tuple(output for unit in units[start:end] for output in unit)
        for start, end in zip(starts, ends, strict=True)
    ]
