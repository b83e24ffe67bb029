"""Second moments of layer inputs, gathered slab by slab on disk: no model is too large for memory.

All layers' matrices together can be larger than the model (a Llama-3.2-1B-shaped one needs 5 GB). The
accumulators are memory-mapped files: the operating system keeps in memory what fits, and the finished
folder is the cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from numpy.typing import NDArray

from ..errors import EngineError, SplitQuantError

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

_INDEX = "index.json"
_SENSITIVITY = "sensitivity.json"
_FORMAT = 1
_ROWS = 256


class MomentWriter:
    """Adds up ``x^T x`` per layer input in a folder. Use it as the sink of an ObservedEngine."""

    def __init__(self, folder: Path, weighting: TokenWeighting) -> None:
        self.folder = folder
        self.weighting = weighting
        self._sums: dict[str, Any] = {}
        self._tokens: dict[str, int] = {}
        self._energy: dict[str, F64] = {}
        self._pending: dict[str, list[F32]] = {}

    def __call__(self, name: str, inputs: F32) -> None:
        """Add the input of ``name``, float32 (tokens, channels). Raises EngineError on NaN or infinity."""
        if not np.isfinite(inputs).all():
            raise EngineError(
                name, "its input overflows on the calibration text", "calibrate with other text"
            )
        # Few rows at a time cost a pass over the whole matrix each: they wait until there are enough
        waiting = self._pending.setdefault(name, [])
        waiting.append(inputs.copy())
        if sum(map(len, waiting)) >= _ROWS:
            self._add(name, np.concatenate(self._pending.pop(name)))

    def _add(self, name: str, inputs: F32) -> None:
        channels = inputs.shape[1]
        if name not in self._sums:
            path = self.folder / f"{len(self._sums):05d}.npy"
            self._sums[name] = open_memmap(path, mode="w+", dtype=np.float32, shape=(channels, channels))
            _take_space(path)
            self._tokens[name] = 0
            self._energy[name] = np.zeros(channels)
        weighted = self.weighting.apply(inputs)
        # numpy turns a product with one's own transpose into a symmetric rank-k update: half the work
        self._sums[name] += weighted.T @ weighted
        self._energy[name] += np.einsum("ij,ij->j", inputs, inputs, dtype=np.float64)
        self._tokens[name] += len(inputs)

    def finish(self, sharing: Mapping[str, str], about: Mapping[str, Any]) -> Moments:
        """Divide by the tokens, write the index, open the result."""
        for name, waiting in self._pending.items():
            self._add(name, np.concatenate(waiting))
        self._pending.clear()
        files: dict[str, str] = {}
        for i, (name, total) in enumerate(self._sums.items()):
            total /= np.float32(self._tokens[name])
            total.flush()
            files[name] = f"{i:05d}.npy"
        self._sums.clear()
        energy: dict[str, Any] = {name: total / self._tokens[name] for name, total in self._energy.items()}
        np.savez(self.folder / "energy.npz", **energy)
        index = {
            "format": _FORMAT,
            "files": files,
            "tokens": self._tokens,
            "sharing": dict(sharing),
            "about": dict(about),
        }
        (self.folder / _INDEX).write_text(json.dumps(index, indent=1))
        return Moments.open(self.folder)


def _take_space(path: Path) -> None:
    """Take a file's space on the disk now: a full disk that memory is mapped to would end the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


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
        energy = np.einsum("ij,ij->i", inputs, inputs)
        middle = np.median(energy)
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
        tokens: that name to the number of tokens seen.
        about: how it was made.
        sensitivity: divergence per unit of a layer's loss, by weight (:mod:`.sensitivity`).
    """

    folder: Path
    sharing: Mapping[str, str]
    files: Mapping[str, str]
    tokens: Mapping[str, int]
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
            measured = folder / _SENSITIVITY
            sensitivity = json.loads(measured.read_text()) if measured.exists() else {}
            values = MappingProxyType({str(n): float(v) for n, v in sensitivity.items()})
            return cls(folder, sharing, files, tokens, about, values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SplitQuantError(folder, f"not a calibration: {error}", "delete this folder") from error

    def with_sensitivity(self, sensitivity: Mapping[str, float]) -> Moments:
        """Keep measured sensitivities in the folder."""
        (self.folder / _SENSITIVITY).write_text(json.dumps(dict(sensitivity), indent=1))
        return Moments.open(self.folder)

    def input_of(self, weight: str) -> str | None:
        """Name of the input that ``weight`` reads; None if calibration did not see that weight."""
        return self.sharing.get(weight)

    def matrix(self, weight: str) -> F32:
        """``X^T X / n`` of the weight's input: float32 (channels, channels), read-only, mapped from disk.

        Raises:
            SplitQuantError: calibration did not see this weight.
        """
        path = self.folder / self.files[self._known(weight)]
        try:
            matrix: F32 = np.load(path, mmap_mode="r")
        except (OSError, ValueError) as error:
            raise SplitQuantError(path, f"cannot be read: {error}", f"delete {self.folder}") from error
        return matrix

    def energy(self, weight: str) -> F64:
        """Mean square of each input channel with all tokens at full weight, as llama.cpp's imatrix counts."""
        with np.load(self.folder / "energy.npz") as stored:
            return np.asarray(stored[self._known(weight)], np.float64)

    def _known(self, weight: str) -> str:
        name = self.sharing.get(weight)
        if name is None:
            raise SplitQuantError(weight, "calibration did not see this weight at work")
        return name
