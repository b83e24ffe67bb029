"""Gather the second moments of layer inputs in bounded memory, however many layers there are.

All layers' matrices together can be larger than the model (a Llama-3.2-1B-shaped one needs 5 GB). So only
those of the narrowest inputs grow while the model runs, as many as a budget holds. The rows of the others are
put into files, and once the text is complete, their matrices are made of them one after the other
(:mod:`.gathered`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import EngineError
from ..gguf_io.writer import free_bytes
from ..linear_algebra import blas_threads
from ..progress import SILENT, Progress
from ..runtime.threads import default_threads
from .experts import Routing
from .gathered import complete_moments, keep_gathered
from .input_sum import ROWS, InputSum, add_rows
from .moments import Moments, TokenWeighting

F32 = NDArray[np.float32]


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
        self._inputs: dict[str, InputSum] = {}
        self._growing: dict[str, _Growing] = {}
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
        total = self._inputs.get(name)
        if total is None:
            path = self.folder / f"{len(self._inputs):05d}.npy"
            total = self._inputs[name] = InputSum(name, path, inputs.shape[1])
        elif not self._settled:  # all inputs have been here once
            self._settle()
        if routing is not None:
            total.route(routing)
        if name in self._growing:
            self._grow(self._growing[name], inputs)
        else:
            total.store(inputs)

    def finish(
        self, sharing: Mapping[str, str], about: Mapping[str, Any], progress: Progress = SILENT
    ) -> Moments:
        """The text is complete: :meth:`keep`, and make the moments that are left (:mod:`.gathered`)."""
        self.keep(sharing)
        return complete_moments(self.folder, self.weighting, about, self._threads, progress)

    def keep(self, sharing: Mapping[str, str]) -> None:
        """Write the sums that grew, and note what the others are made of.

        Raises:
            OSError: the folder has no room.
        """
        self._add([growing for growing in self._growing.values() if growing.waiting])
        with ThreadPoolExecutor(self._threads) as pool:
            # each leaves memory when it is written
            for _ in pool.map(lambda name: self._growing.pop(name).write(), list(self._growing)):
                pass
        keep_gathered(self.folder, self._inputs.values(), sharing)

    def _settle(self) -> None:
        """Let the narrowest inputs grow in memory."""
        self._settled = True
        self._check_room()
        for total in sorted(self._inputs.values(), key=lambda total: total.channels):
            taken = 4 * total.channels * (total.channels + ROWS)
            if taken > self._memory:
                break
            self._memory -= taken
            self._growing[total.name] = growing = _Growing.of(total)
            for rows in total.stored_rows():
                self._grow(growing, rows)
            total.rows_path.unlink()
            total.stored = 0

    def _check_room(self) -> None:
        """Raise OSError now where the disk would be full in the end."""
        if self._tokens is None:
            return
        totals = self._inputs.values()
        first = min(total.stored for total in totals)  # experts' inputs have more
        needed = sum(
            4 * total.channels * max(total.channels, self._tokens * total.stored // first) for total in totals
        )
        needed += 2 * max(4 * total.channels**2 for total in totals)  # there beside their rows
        there = sum(4 * total.channels * total.stored for total in totals)
        if needed - there > free_bytes(self.folder):
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}, {needed:,} bytes are needed")

    def _grow(self, growing: _Growing, inputs: F32) -> None:
        while len(inputs):
            if growing.full:
                self._add([other for other in self._growing.values() if other.full])
            inputs = growing.take(inputs)

    def _add(self, growing: Sequence[_Growing]) -> None:
        """Add the rows that wait: threads share the sums, and strips of them."""
        with blas_threads(1), ThreadPoolExecutor(self._threads) as pool:
            counted = list(pool.map(lambda g: g.total.count(g.waiting_rows, self.weighting), growing))
            add_rows(zip((g.matrix for g in growing), counted, strict=True), pool)
        for each in growing:
            each.waiting = 0


@dataclass
class _Growing:
    """A sum that grows in memory.

    Attributes:
        total: what is counted.
        matrix: one triangle of it: float32 (channels, channels).
        rows: room for rows that are not in it yet: float32 (ROWS, channels).
        waiting: how many of ``rows`` are taken.
    """

    total: InputSum
    matrix: F32
    rows: F32
    waiting: int = 0

    @classmethod
    def of(cls, total: InputSum) -> _Growing:
        matrix = np.zeros((total.channels, total.channels), np.float32)
        return cls(total, matrix, np.empty((ROWS, total.channels), np.float32))

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

    def write(self) -> None:
        self.total.write(self.matrix)
