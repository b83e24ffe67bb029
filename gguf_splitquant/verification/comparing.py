"""Tensors made again are compared with those of a file, as they come; a sample stands for all of them."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..gguf_io.header import TensorEntry
from ..planning.plan import TensorPlan
from ..sources.reading import PositionedFile

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class Difference:
    """Something that is not as the recipe makes it.

    Attributes:
        subject: a tensor, ``metadata KEY``, or a file.
        cause: how it differs.
    """

    subject: str
    cause: str

    def __str__(self) -> str:
        return f"{self.subject}: {self.cause}"


class Comparing:
    """A sink that compares with files what would be written to them.

    Args:
        entries: the tensors of the files; what is in none of them is let go.
    """

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self._entries = {entry.name: entry for entry in entries}
        self._files = {path: PositionedFile(path) for path in {entry.file for entry in entries}}
        self._wrong: dict[str, int] = {}
        self._lock = threading.Lock()
        self.compared = 0

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        """Compare ``data`` with byte ``position`` and on of the file's ``tensor``."""
        entry = self._entries.get(tensor)
        wanted = np.frombuffer(memoryview(data).cast("B"), np.uint8)
        if entry is None or position + len(wanted) > entry.nbytes:
            return  # the list of tensors says so already
        found = np.empty(len(wanted), np.uint8)
        self._files[entry.file].read_into(found.data, entry.offset + position)
        wrong = int(np.count_nonzero(found != wanted))
        with self._lock:
            self.compared += len(wanted)
            if wrong:
                self._wrong[tensor] = self._wrong.get(tensor, 0) + wrong

    def wrong(self) -> list[tuple[TensorEntry, int]]:
        """The tensors that differ, in file order, and in how many bytes."""
        return [(entry, self._wrong[name]) for name, entry in self._entries.items() if name in self._wrong]


def sample_of(plans: Sequence[TensorPlan], count: int | None, seed: int) -> list[TensorPlan]:
    """One of every kind of layer and type, then others up to ``count``, in file order; None: all of them."""
    if count is None:
        return list(plans)
    generator = random.Random(seed)
    shuffled = list(plans)
    generator.shuffle(shuffled)
    kinds: dict[tuple[str, ...], TensorPlan] = {}
    for plan in shuffled:
        kind = (_NUMBER.sub("N", plan.source.name), *(o.qtype.name for o in plan.outputs))
        kinds.setdefault(kind, plan)
    chosen = {plan.source.name for plan in kinds.values()}
    others = (plan.source.name for plan in shuffled if plan.source.name not in chosen)
    chosen.update(name for name, _ in zip(others, range(count - len(chosen)), strict=False))
    return [plan for plan in plans if plan.source.name in chosen]
