"""Second moments of layer inputs: what calibration found, in the folder that is its cache.

:mod:`.moment_writer` fills it. Matrices are read one at a time: together they can be larger than the model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import SplitQuantError
from ..linear_algebra import blas_threads
from ..planning.curves import ExpertUse, Salience
from ..progress import SILENT, Progress
from ..refining.metric import Feedback
from .experts import expert_energy, expert_matrix, expert_use
from .factors import room_for_two
from .whole_files import whole_file

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

INDEX, FORMAT = "index.json", 2
"""File that completes the folder, and the version that it states."""

_SENSITIVITY = "sensitivity.json"
_SALIENCE = "-salience.npy"


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
            index = json.loads((folder / INDEX).read_text())
            if index["format"] != FORMAT:
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
        with whole_file(path) as partial:
            np.save(partial, np.stack([salience.order, salience.left]))
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
