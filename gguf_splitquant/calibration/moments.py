"""Second moments of layer inputs, gathered slab by slab: no model is too large for memory.

All layers' matrices together can be larger than the model (a Llama-3.2-1B-shaped one needs 5 GB). They grow
in memory for as far as there is some to spare, and else in memory-mapped files, of which the operating system
keeps in memory what fits. Those are slower: the system writes pages back while they still change. The
finished folder is the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ..errors import EngineError, SplitQuantError
from ..linear_algebra import add_gram_rows, blas_threads
from ..planning.curves import ExpertUse, Salience
from ..progress import SILENT, Progress
from ..refining.metric import Feedback
from ..runtime.threads import default_threads
from .experts import Routing, RowWriter, expert_energy, expert_matrix, expert_use
from .factors import room_for_two

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_INDEX = "index.json"
_SENSITIVITY = "sensitivity.json"
_FORMAT = 2
_ROWS = 512
_STRIP = 512
"""Rows of a matrix that one thread adds to at a time: few, as what lies left of the diagonal is in vain."""

_WAITING = ".waiting.npy"
_SALIENCE = "-salience.npy"


class MomentWriter:
    """Adds up ``x^T x`` per layer input in a folder. Use it as the sink of an ObservedEngine.

    Args:
        folder: takes the result.
        weighting: what each token counts.
        memory: bytes that may grow in the process's memory; what goes beyond them grows in mapped files. The
            result does not depend on it.
        threads: that add; None: one per performance core. Nor does it depend on them.
    """

    def __init__(
        self, folder: Path, weighting: TokenWeighting, memory: int = 0, threads: int | None = None
    ) -> None:
        self._threads = threads or default_threads()
        self.folder = folder
        self.weighting = weighting
        self._memory = memory
        self._sums: dict[str, _Sum] = {}
        self._stacks: dict[str, RowWriter] = {}

    def __call__(self, name: str, inputs: F32, routing: Routing | None = None) -> None:
        """Add the input of ``name``, float32 (rows, channels). Raises EngineError on NaN or infinity."""
        if not np.isfinite(inputs).all():
            raise EngineError(
                name, "its input overflows on the calibration text", "calibrate with other text"
            )
        total = self._sums.get(name) or self._begin(name, inputs.shape[1])
        # Few rows at a time cost a pass over the whole matrix each: they wait until there are enough
        for start in range(0, len(inputs), _ROWS):
            rows = inputs[start : start + _ROWS]
            total.coming = len(rows)
            if total.full:
                self._add([s for s in self._sums.values() if s.full])
            total.rows[total.waiting : total.waiting + len(rows)] = rows
            total.waiting += len(rows)
            if routing is not None:
                total.routes.append(Routing(routing.experts[start : start + _ROWS], routing.count))

    def _begin(self, name: str, channels: int) -> _Sum:
        path = self.folder / f"{len(self._sums):05d}.npy"
        matrix = _mapped(path, channels, channels)  # the result will need the space anyway
        taken = 4 * channels * (channels + _ROWS)
        if taken <= self._memory:
            self._memory -= taken
            matrix, rows = np.zeros((channels, channels), np.float32), np.empty((_ROWS, channels), np.float32)
        else:
            rows = _mapped(path.with_suffix(_WAITING), _ROWS, channels)
        self._sums[name] = total = _Sum(name, path, matrix, rows, np.zeros(channels))
        return total

    def _add(self, totals: Sequence[_Sum]) -> None:
        """Add what waits: threads share the sums, and strips of them."""
        with blas_threads(1), ThreadPoolExecutor(self._threads) as pool:
            weighted = list(pool.map(lambda total: total.take(self.weighting), totals))
            strips = [
                (total.matrix, rows, start, min(start + _STRIP, len(total.matrix)))
                for total, rows in zip(totals, weighted, strict=True)
                for start in range(0, len(total.matrix), _STRIP)
            ]
            for _ in pool.map(lambda strip: add_gram_rows(*strip), strips):
                pass
        for total, rows in zip(totals, weighted, strict=True):
            if total.routes:
                inputs = total.rows[: total.waiting]
                if total.name not in self._stacks:
                    stem = total.path.with_name(f"{total.path.stem}-experts")
                    self._stacks[total.name] = RowWriter(stem, total.routes[0].count, inputs.shape[1])
                experts = np.concatenate([r.experts for r in total.routes])
                self._stacks[total.name].add(inputs, rows, experts)
            total.waiting = 0
            total.routes.clear()

    def finish(self, sharing: Mapping[str, str], about: Mapping[str, Any]) -> Moments:
        """Divide by the tokens, write the index, open the result."""
        files = {name: total.path.name for name, total in self._sums.items()}
        tokens: dict[str, int] = {}
        energy: dict[str, Any] = {}
        self._add([total for total in self._sums.values() if total.waiting])
        for name, total in self._sums.items():
            tokens[name] = total.tokens
            energy[name] = total.energy / total.tokens
        with ThreadPoolExecutor(self._threads) as pool:
            # each leaves memory when it is written
            for _ in pool.map(lambda name: self._sums.pop(name).write(), list(self._sums)):
                pass
        for stack in self._stacks.values():
            stack.finish()
        np.savez(self.folder / "energy.npz", **energy)
        index = {
            "format": _FORMAT,
            "files": files,
            "tokens": tokens,
            "experts": {name: stack.counts.tolist() for name, stack in self._stacks.items()},
            "sharing": dict(sharing),
            "about": dict(about),
        }
        (self.folder / _INDEX).write_text(json.dumps(index, indent=1))
        return Moments.open(self.folder)


@dataclass
class _Sum:
    """The growing second moments of one input.

    Attributes:
        name: of the weight that it is gathered under.
        path: of the result.
        matrix: the sum so far, one triangle of it: float32 (channels, channels).
        rows: room for rows that are not in it yet: float32 (_ROWS, channels).
        energy: sum of squares of each channel.
        waiting: how many of ``rows`` are taken.
        coming: how many come next, as far as one can tell.
        tokens: rows in the sum.
        routes: which experts read the waiting rows.
    """

    name: str
    path: Path
    matrix: F32
    rows: F32
    energy: F64
    waiting: int = 0
    coming: int = 0
    tokens: int = 0
    routes: list[Routing] = field(default_factory=list)

    @property
    def full(self) -> bool:
        """There is no room for what comes next."""
        return self.waiting + self.coming > _ROWS

    def take(self, weighting: TokenWeighting) -> F32:
        """Count the waiting rows, and return them as they count in the sum: float32 (rows, channels)."""
        inputs = self.rows[: self.waiting]
        self.energy += np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        self.tokens += len(inputs)
        return weighting.apply(inputs)

    def write(self) -> None:
        """Divide by the tokens and put the whole matrix into its file."""
        self.matrix /= np.float32(self.tokens)
        _mirror(self.matrix)
        if isinstance(self.matrix, np.memmap):
            self.matrix.flush()
        else:
            np.save(self.path, self.matrix)
        self.path.with_suffix(_WAITING).unlink(missing_ok=True)


def _mirror(matrix: F32) -> None:
    """Complete a symmetric matrix of which the upper triangle is known, in place."""
    for start in range(0, len(matrix), _ROWS):
        rows = slice(start, start + _ROWS)
        matrix[rows.stop :, rows] = matrix[rows, rows.stop :].T
        block = np.triu(matrix[rows, rows])
        matrix[rows, rows] = block + np.triu(block, 1).T


def _mapped(path: Path, rows: int, columns: int) -> F32:
    """A matrix of zeros, float32 (rows, columns), in a new file that memory is mapped to."""
    matrix: F32 = open_memmap(path, mode="w+", dtype=np.float32, shape=(rows, columns))
    # Take the space on the disk now: a full disk behind mapped memory would end the process
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return matrix


@dataclass(frozen=True)
class TokenWeighting:
    """How much each token counts in the moments of an input.

    Some tokens, most of all the first of a text, are attention sinks: in a few layers they carry activations
    a thousand times larger than all others, in many layers far smaller ones, and every later token attends
    to them. Leaving them out of the statistics ruins the model.

    Attributes:
        floor: a token counts with at least ``floor`` times the median energy of the tokens beside it.
        limit: and with at most ``limit`` times; infinity counts massive ones as they are.
    """

    floor: float = 0.0
    limit: float = float("inf")

    def apply(self, inputs: F32) -> F32:
        """Scale the rows to the energy that they count with; (tokens, channels) in and out."""
        if self.floor == 0 and self.limit == float("inf"):
            return inputs
        energy = np.einsum("ij,ij->i", inputs, inputs)
        middle = np.median(energy)
        if middle == 0:  # an input that is mostly nothing has no typical token
            return inputs
        wanted = np.clip(energy, np.float32(self.floor) * middle, np.float32(self.limit) * middle)
        if (wanted == energy).all():
            return inputs
        # a token without any activation cannot be scaled up
        scale = np.sqrt(np.where(energy > 0, wanted / np.where(energy > 0, energy, 1), 1))
        return (inputs * scale[:, None]).astype(np.float32)


@dataclass(frozen=True)
class Moments:
    """What calibration found out about a model's layer inputs.

    Attributes:
        folder: where the matrices are.
        sharing: weight to the name under which its input was gathered: weights of equal value read the same
            input.
        files: that name to its matrix.
        tokens: that name to the number of tokens seen; what experts' down projections read counts once for
            every expert of a token.
        uses: that name, where a stack of experts reads it, to the rows that each expert multiplied.
        about: how it was made.
        sensitivity: divergence per unit of a layer's loss, by weight (:mod:`.sensitivity`).
    """

    folder: Path
    sharing: Mapping[str, str]
    files: Mapping[str, str]
    tokens: Mapping[str, int]
    uses: Mapping[str, tuple[int, ...]]
    about: Mapping[str, Any]
    sensitivity: Mapping[str, float]

    @classmethod
    def open(cls, folder: Path) -> Moments:
        """Open a finished folder. Raises SplitQuantError if it is not one."""
        try:
            index = json.loads((folder / _INDEX).read_text())
            if index["format"] != _FORMAT:
                raise ValueError(f"format {index['format']}")
            sharing, files, tokens, about = (
                MappingProxyType(index[k]) for k in ("sharing", "files", "tokens", "about")
            )
            uses = MappingProxyType({n: tuple(counts) for n, counts in index["experts"].items()})
            measured = folder / _SENSITIVITY
            sensitivity = json.loads(measured.read_text()) if measured.exists() else {}
            values = MappingProxyType({str(n): float(v) for n, v in sensitivity.items()})
            return cls(folder, sharing, files, tokens, uses, about, values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SplitQuantError(folder, f"not a calibration: {error}", "delete this folder") from error

    def with_sensitivity(self, sensitivity: Mapping[str, float]) -> Moments:
        """Keep measured sensitivities in the folder."""
        (self.folder / _SENSITIVITY).write_text(json.dumps(dict(sensitivity), indent=1))
        return Moments.open(self.folder)

    def input_of(self, weight: str) -> str | None:
        """Name of the input that ``weight`` reads; None if calibration did not see that weight."""
        return self.sharing.get(weight)

    def matrix(self, weight: str, expert: int | None = None) -> F32:
        """``X^T X / n`` of the weight's input: float32 (channels, channels).

        Args:
            weight: its name.
            expert: of a stack, the one whose rows are meant; None: all, read-only, mapped from disk.

        Raises:
            SplitQuantError: calibration did not see this weight.
        """
        path = self.folder / self.files[self._known(weight)]
        try:
            matrix: F32 = np.load(path, mmap_mode="r")
        except (OSError, EOFError, ValueError) as error:
            raise SplitQuantError(path, f"cannot be read: {error}", f"delete {self.folder}") from error
        return matrix if expert is None else expert_matrix(self._stem(weight), expert, matrix)

    def feedback(self, weight: str) -> Feedback:
        """What errors of the weight become: a factorization, whose salience is kept in the folder.

        Raises:
            SplitQuantError: as :meth:`matrix`; or the moments are no second moments.
            OSError: the salience cannot be written.
        """
        feedback = Feedback.of(self.matrix(weight))
        salience, path = feedback.salience, self._salience_path(weight)
        partial = path.with_suffix(".partial.npy")  # a kill must not leave half of it
        np.save(partial, np.stack([salience.order, salience.left]))
        partial.replace(path)
        return feedback

    def complete_salience(self, progress: Progress = SILENT) -> None:
        """Keep the salience of all inputs, so that no plan has to factor their moments again."""
        left = [name for name in self.files if not self._salience_path(name).exists()]
        widest = max((len(self.matrix(name)) for name in left), default=0)

        def keep(name: str) -> None:
            self.feedback(name)  # which is large: it goes at once

        progress.start("factoring statistics", len(left), "inputs")
        # each alone: sums must not depend on the number of threads
        with blas_threads(1), ThreadPoolExecutor(2 if room_for_two(widest) else 1) as pool:
            for name, _ in zip(left, pool.map(keep, left), strict=True):
                progress.advance(1, name)
        progress.finish()

    def salience(self, weight: str) -> Salience:
        """Of the weight's input channels: what is kept of it, or it is computed. Errors as :meth:`matrix`."""
        path = self._salience_path(weight)
        try:
            order, left = np.load(path)
        except FileNotFoundError:
            return Feedback.of(self.matrix(weight)).salience
        except (OSError, EOFError, ValueError) as error:
            raise SplitQuantError(path, f"cannot be read: {error}", f"delete {self.folder}") from error
        return Salience(order.astype(np.int64), left)

    def experts(self, weight: str) -> ExpertUse | None:
        """How often each expert of a stack was used; None for other weights."""
        counts = self.uses.get(self.sharing.get(weight, ""))
        return expert_use(counts, self.matrix(weight).shape[0]) if counts else None

    def energy(self, weight: str) -> F64:
        """Mean square of each input channel with all tokens at full weight, as llama.cpp's imatrix counts.

        Returns:
            (channels,), or (experts, channels) for a stack of experts.
        """
        name = self._known(weight)
        with np.load(self.folder / "energy.npz") as stored:
            pooled = np.asarray(stored[name], np.float64)
        return expert_energy(self._stem(weight), self.uses[name], pooled) if name in self.uses else pooled

    def _salience_path(self, weight: str) -> Path:
        return self.folder / self.files[self._known(weight)].replace(".npy", _SALIENCE)

    def _stem(self, weight: str) -> Path:
        return self.folder / self.files[self._known(weight)].replace(".npy", "-experts")

    def _known(self, weight: str) -> str:
        name = self.sharing.get(weight)
        if name is None:
            raise SplitQuantError(weight, "calibration did not see this weight at work")
        return name
