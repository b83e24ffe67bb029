"""What becomes the second moments of one layer input, and the files that it is in meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..linear_algebra import add_gram_rows
from .experts import Routing, RowWriter
from .moments import TokenWeighting
from .whole_files import whole_file

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]

ROWS = 512
"""Rows that are added at a time: fewer would cost a pass over the whole matrix each."""

_STRIP, _WIDE = 512, 4096
"""Rows of a matrix that one thread adds to at a time: few, as what lies left of the diagonal is in vain. From
so many channels on twice as many, as BLAS is faster on larger pieces."""


@dataclass
class InputSum:
    """The sum of one input: its matrix in memory (:mod:`.moment_writer`), or rows that wait in a file.

    Attributes:
        name: of the weight that it is gathered under.
        path: of the result.
        channels: of the input.
        stored: rows that wait in :attr:`rows_path`; 0 once the result is there.
        tokens: rows that are counted.
        energy: sum of squares of each channel.
        routes: which experts read the rows that are not counted yet.
        stack: takes what experts read; None where there are none.
    """

    name: str
    path: Path
    channels: int
    stored: int = 0
    tokens: int = 0
    energy: F64 = field(init=False)
    routes: list[I32] = field(default_factory=list)
    stack: RowWriter | None = None

    def __post_init__(self) -> None:
        self.energy = np.zeros(self.channels)

    @property
    def rows_path(self) -> Path:
        """File of rows that wait, float32."""
        return self.path.with_suffix(".waiting")

    def store(self, inputs: F32) -> None:
        """Let rows wait in the file. Raises OSError if there is no room."""
        with self.rows_path.open("ab") as file:
            file.write(inputs.data)
        self.stored += len(inputs)

    def stored_rows(self) -> Iterator[F32]:
        """The rows that wait, :data:`ROWS` at a time: float32 (rows, channels)."""
        with self.rows_path.open("rb") as file:
            for start in range(0, self.stored, ROWS):
                count = min(ROWS, self.stored - start)
                yield np.fromfile(file, np.float32, count * self.channels).reshape(count, self.channels)

    def route(self, routing: Routing) -> None:
        """Which experts multiply the rows that come next."""
        self.routes.append(routing.experts)
        if self.stack is None:
            self.stack = self._new_stack(routing.count)

    def count(self, inputs: F32, weighting: TokenWeighting) -> F32:
        """Count rows, and return them as they count in the sum: float32 (rows, channels)."""
        self.energy += np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        self.tokens += len(inputs)
        weighted = weighting.apply(inputs)
        if self.stack is not None:
            experts = np.concatenate(self.routes)
            self.routes = [experts[len(inputs) :]]
            self.stack.add(inputs, weighted, experts[: len(inputs)])
        return weighted

    def write(self, matrix: F32) -> None:
        """Put the sum, of which the upper triangle is there, into its file, whole or not at all."""
        matrix /= np.float32(self.tokens)
        _mirror(matrix)
        with whole_file(self.path) as partial:
            np.save(partial, matrix)
        if self.stack is not None:
            self.stack.finish()
        self.stored = 0

    def save(self, record: Path) -> None:
        """Keep all but the matrix and the rows, which are in files of their own."""
        counts = self.stack.counts if self.stack is not None else np.zeros(0, np.int64)
        routes = np.concatenate(self.routes) if self.routes else np.zeros((0, 0), np.int32)
        figures = np.array([self.channels, self.stored, self.tokens])
        name = np.array(self.name)
        with whole_file(record) as partial:
            np.savez(partial, name=name, figures=figures, energy=self.energy, counts=counts, routes=routes)

    @classmethod
    def load(cls, record: Path, folder: Path) -> InputSum:
        """What :meth:`save` kept; ``folder`` has the other files. Raises OSError or ValueError."""
        with np.load(record) as kept:
            channels, stored, tokens = (int(n) for n in kept["figures"])
            path = folder / f"{record.stem}.npy"
            found = cls(str(kept["name"]), path, channels, stored, tokens)
            found.energy = kept["energy"]
            if kept["counts"].size:
                found.stack = found._new_stack(len(kept["counts"]))
                found.stack.counts[:] = kept["counts"]
                found.routes = [kept["routes"]]
        return found

    def _new_stack(self, experts: int) -> RowWriter:
        return RowWriter(self.path.with_name(f"{self.path.stem}-experts"), experts, self.channels)


def add_rows(sums: Iterable[tuple[F32, F32]], pool: Executor) -> None:
    """``matrix += rows^T rows``, the upper triangle, of every (matrix, rows): threads share their strips."""
    strips = [strip for matrix, rows in sums for strip in _strips(matrix, rows)]
    for _ in pool.map(lambda strip: add_gram_rows(*strip), strips):
        pass


def _strips(matrix: F32, rows: F32) -> list[tuple[F32, F32, int, int]]:
    step = _STRIP if len(matrix) < _WIDE else 2 * _STRIP
    return [(matrix, rows, start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]


def _mirror(matrix: F32) -> None:
    """Complete a symmetric matrix of which the upper triangle is known, in place."""
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, start + ROWS)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
        block = np.triu(matrix[rows, rows])
        matrix[rows, rows] = block + np.triu(block, 1).T
