"""Gather the second moments of layer inputs in bounded memory, however many layers there are.

All layers' matrices together can be larger than the model (a Llama-3.2-1B-shaped one needs 5 GB). So only
those of the narrowest inputs grow while the model runs, as many as a budget holds. The rows of the others are
put into files, and once the text is complete, their matrices are made of them, one input after the other.
A matrix takes the place of its rows on the disk.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..linear_algebra import add_gram_rows, blas_threads
from ..progress import SILENT, Progress
from ..runtime.threads import default_threads
from .experts import Routing, RowWriter
from .moments import FORMAT, INDEX, Moments, TokenWeighting

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_ROWS = 512
"""Rows that are added at a time: fewer would cost a pass over the whole matrix each."""

_STRIP = 512
"""Rows of a matrix that one thread adds to at a time: few, as what lies left of the diagonal is in vain."""


class MomentWriter:
    """Adds up ``x^T x`` per layer input in a folder. Use it as the sink of an ObservedEngine.

    Args:
        folder: takes the result.
        weighting: what each token counts.
        tokens: that are to come, for a look at the room on the disk. None: nobody looks.
        memory: bytes for sums that grow while the model runs. The result does not depend on it.
        threads: that add; None: one per performance core. Nor does it depend on them.
    """

    def __init__(
        self,
        folder: Path,
        weighting: TokenWeighting,
        tokens: int | None = None,
        memory: int = 0,
        threads: int | None = None,
    ) -> None:
        self._threads = threads or default_threads()
        self.folder = folder
        self.weighting = weighting
        self._tokens = tokens
        self._memory = memory
        self._sums: dict[str, _Sum] = {}
        self._settled = False

    def __call__(self, name: str, inputs: F32, routing: Routing | None = None) -> None:
        """Add the input of ``name``, float32 (rows, channels).

        Raises:
            EngineError: NaN or infinity.
            OSError: the folder has no room.
        """
        if not np.isfinite(inputs).all():
            raise EngineError(
                name, "its input overflows on the calibration text", "calibrate with other text"
            )
        total = self._sums.get(name)
        if total is None:
            path = self.folder / f"{len(self._sums):05d}.npy"
            total = self._sums[name] = _Sum(name, path, inputs.shape[1])
        elif not self._settled:  # all inputs have been here once
            self._settle()
        if routing is not None:
            total.route(routing)
        self._take(total, inputs)

    def _take(self, total: _Sum, inputs: F32) -> None:
        if total.grown is None:
            with total.rows_path.open("ab") as file:
                file.write(inputs.data)
            total.stored += len(inputs)
            return
        while len(inputs):
            if total.grown.full:
                self._add([t for t in self._sums.values() if t.grown is not None and t.grown.full])
            inputs = total.grown.take(inputs)

    def _settle(self) -> None:
        """Let the narrowest inputs grow in memory."""
        self._settled = True
        self._check_room()
        for total in sorted(self._sums.values(), key=lambda total: total.channels):
            taken = 4 * total.channels * (total.channels + _ROWS)
            if taken > self._memory:
                break
            self._memory -= taken
            count, total.stored = total.stored, 0
            total.grown = _Grown.of(total.channels)
            with total.rows_path.open("rb") as file:
                for start in range(0, count, _ROWS):
                    self._take(total, total.read(file, min(_ROWS, count - start)))
            total.rows_path.unlink()

    def _check_room(self) -> None:
        """Raise OSError now where the disk would be full in the end."""
        if self._tokens is None:
            return
        first = min(total.stored for total in self._sums.values())  # experts' inputs have more
        needed = sum(
            4 * total.channels * max(total.channels, self._tokens * total.stored // first)
            for total in self._sums.values()
        )
        there = sum(4 * total.channels * total.stored for total in self._sums.values())
        if needed - there > shutil.disk_usage(self.folder).free:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {needed:,} bytes are needed")

    def _add(self, totals: Sequence[_Sum]) -> None:
        """Add what waits in memory: threads share the sums, and strips of them."""
        with blas_threads(1), ThreadPoolExecutor(self._threads) as pool:
            grown = [(total, total.grown) for total in totals if total.grown is not None]
            weighted = list(pool.map(lambda pair: pair[0].count(pair[1].waiting_rows, self.weighting), grown))
            strips = [
                strip
                for (_, sums), rows in zip(grown, weighted, strict=True)
                for strip in _strips(sums.matrix, rows)
            ]
            for _ in pool.map(lambda strip: add_gram_rows(*strip), strips):
                pass
        for _, sums in grown:
            sums.waiting = 0

    def finish(
        self, sharing: Mapping[str, str], about: Mapping[str, Any], progress: Progress = SILENT
    ) -> Moments:
        """Add what is in files, divide by the tokens, write the index, open the result.

        Raises:
            OSError: the folder has no room.
        """
        self._add([total for total in self._sums.values() if total.grown and total.grown.waiting])
        with ThreadPoolExecutor(self._threads) as pool:
            for _ in pool.map(_Sum.write_grown, [t for t in self._sums.values() if t.grown]):
                pass
        left = [total for total in self._sums.values() if total.stored]
        if left:
            self._add_stored(left, progress)
        energy: dict[str, Any] = {name: total.energy / total.tokens for name, total in self._sums.items()}
        np.savez(self.folder / "energy.npz", **energy)
        stacks = {name: total.stack for name, total in self._sums.items() if total.stack is not None}
        for stack in stacks.values():
            stack.finish()
        index = {
            "format": FORMAT,
            "files": {name: total.path.name for name, total in self._sums.items()},
            "tokens": {name: total.tokens for name, total in self._sums.items()},
            "experts": {name: stack.counts.tolist() for name, stack in stacks.items()},
            "sharing": dict(sharing),
            "about": dict(about),
        }
        (self.folder / INDEX).write_text(json.dumps(index, indent=1))
        return Moments.open(self.folder)

    def _add_stored(self, totals: Sequence[_Sum], progress: Progress) -> None:
        """One input after the other: its matrix, while that of the one before is written."""
        progress.start("adding up statistics", sum(total.stored for total in totals), "rows")
        writing: Future[None] | None = None
        # one thread more: it waits for the disk
        with blas_threads(1), ThreadPoolExecutor(self._threads + 1) as pool:
            for total in totals:
                matrix = np.zeros((total.channels, total.channels), np.float32)
                for rows in self._read_ahead(total, pool):
                    for _ in pool.map(lambda strip: add_gram_rows(*strip), _strips(matrix, rows)):
                        pass
                    progress.advance(len(rows), total.name)
                if writing is not None:
                    writing.result()
                writing = pool.submit(total.write, matrix)
                del matrix
            if writing is not None:
                writing.result()
        progress.finish()

    def _read_ahead(self, total: _Sum, pool: ThreadPoolExecutor) -> Iterable[F32]:
        """Rows of an input as they count, ``_ROWS`` at a time; the next are read while these are added."""
        with total.rows_path.open("rb") as file:

            def read(count: int) -> F32:
                return total.count(total.read(file, count), self.weighting)

            counts = [min(_ROWS, total.stored - start) for start in range(0, total.stored, _ROWS)]
            ahead = pool.submit(read, counts[0])
            for count in [*counts[1:], 0]:
                rows = ahead.result()
                if count:
                    ahead = pool.submit(read, count)
                yield rows


@dataclass
class _Grown:
    """A sum that grows in memory.

    Attributes:
        matrix: one triangle of it: float32 (channels, channels).
        rows: room for rows that are not in it yet: float32 (_ROWS, channels).
        waiting: how many of ``rows`` are taken.
    """

    matrix: F32
    rows: F32
    waiting: int = 0

    @classmethod
    def of(cls, channels: int) -> _Grown:
        return cls(np.zeros((channels, channels), np.float32), np.empty((_ROWS, channels), np.float32))

    @property
    def full(self) -> bool:
        return self.waiting == len(self.rows)

    @property
    def waiting_rows(self) -> F32:
        return self.rows[: self.waiting]

    def take(self, inputs: F32) -> F32:
        """Keep rows; those that there is no room for are returned."""
        taken = inputs[: len(self.rows) - self.waiting]
        self.rows[self.waiting : self.waiting + len(taken)] = taken
        self.waiting += len(taken)
        return inputs[len(taken) :]


@dataclass
class _Sum:
    """What becomes the second moments of one input.

    Attributes:
        name: of the weight that it is gathered under.
        path: of the result.
        channels: of the input.
        grown: the sum, where it grows in memory; None: the rows are in a file.
        stored: rows in that file.
        energy: sum of squares of each channel.
        tokens: rows that are counted.
        routes: which experts read the rows that are not counted yet.
        stack: takes what experts read.
    """

    name: str
    path: Path
    channels: int
    grown: _Grown | None = None
    stored: int = 0
    energy: F64 = field(init=False)
    tokens: int = 0
    routes: list[NDArray[np.int32]] = field(default_factory=list)
    stack: RowWriter | None = None

    def __post_init__(self) -> None:
        self.energy = np.zeros(self.channels)

    @property
    def rows_path(self) -> Path:
        return self.path.with_suffix(".waiting")

    def read(self, file: Any, count: int) -> F32:
        """The next rows of the file: float32 (count, channels)."""
        return np.fromfile(file, np.float32, count * self.channels).reshape(count, self.channels)

    def route(self, routing: Routing) -> None:
        """Which experts multiply the rows that come next."""
        self.routes.append(routing.experts)
        if self.stack is None:
            stem = self.path.with_name(f"{self.path.stem}-experts")
            self.stack = RowWriter(stem, routing.count, self.channels)

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

    def write_grown(self) -> None:
        """Write the sum that grew in memory, which leaves it."""
        grown, self.grown = self.grown, None
        assert grown is not None
        self.write(grown.matrix)

    def write(self, matrix: F32) -> None:
        """Put the sum, of which the upper triangle is there, into its file; the rows' file goes before."""
        self.rows_path.unlink(missing_ok=True)
        matrix /= np.float32(self.tokens)
        _mirror(matrix)
        np.save(self.path, matrix)


def _strips(matrix: F32, rows: F32) -> list[tuple[F32, F32, int, int]]:
    """What threads share when rows are added to a matrix: arguments of :func:`add_gram_rows`."""
    return [
        (matrix, rows, start, min(start + _STRIP, len(matrix))) for start in range(0, len(matrix), _STRIP)
    ]


def _mirror(matrix: F32) -> None:
    """Complete a symmetric matrix of which the upper triangle is known, in place."""
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
        block = np.triu(matrix[rows, rows])
        matrix[rows, rows] = block + np.triu(block, 1).T
