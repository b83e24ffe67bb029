"""Calibration of a checkpoint, found again by the checkpoint itself.

Results are kept under a digest of the weights. What that digest is, is remembered by the checkpoint's files:
the next conversion of the checkpoint finds its calibration without reading the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from .. import __version__
from ..cache import cache_dir
from ..errors import OutputError
from ..progress import SILENT, Progress
from ..replacing import write_text
from ..resuming import files_identity
from ..sources.model import SourceModel, SourceTensor
from ..splitting.histogram import check_finite, row_slabs
from .calibrate import MEMORY, Calibration, cached, calibrate
from .moments import Moments


def calibrate_model(
    model: SourceModel,
    how: Calibration | None = None,
    *,
    threads: int | None = None,
    memory: int = MEMORY,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Moments:
    """Statistics of every linear layer's input, from the cache where they are known.

    Args:
        model: the checkpoint. It is run as it is: no other copy of it is written (:mod:`.runnable`).
        how: the text: by default the model's own.
        threads: None is all cores.
        memory: see :func:`.calibrate.calibrate`.
        cache: folder for results; None: in the user's cache folder. Machines that share it calibrate once.
        progress: of reading the weights, writing the text, and gathering.

    Raises:
        OutputError: the cache cannot be written.
        EngineError: the runtime is missing, or the model does not run.
        CheckpointError: NaN or Inf in a weight.
    """
    how = how or Calibration()
    cache = cache or cache_dir() / "calibration"
    remembered = _Digest(model, cache) if model.files else None
    if remembered is not None and remembered.value:
        moments = cached(remembered.value, how, cache)
        if moments is not None:
            return moments
    digest = _weights_digest(model, threads or os.cpu_count() or 1, progress)
    if remembered is not None:
        remembered.keep(digest)
    return calibrate(model, digest, how, n_threads=threads, memory=memory, progress=progress, cache=cache)


class _Digest:
    """The digest of a checkpoint's weights, remembered in the cache.

    Attributes:
        value: what is remembered; empty if nothing is.
    """

    def __init__(self, model: SourceModel, cache: Path) -> None:
        about = [__version__, files_identity(model.files), _metadata(model)]
        name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        self._path = cache / "checkpoints" / name
        try:
            self.value = self._path.read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            self.value = ""

    def keep(self, value: str) -> None:
        """Remember. Raises OutputError where the cache cannot be written."""
        fix = "free space, or set GGUF_SPLITQUANT_CACHE"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(self._path, f"cannot be written: {error.strerror}", fix) from error
        write_text(self._path, value + "\n", fix)


def _weights_digest(model: SourceModel, threads: int, progress: Progress) -> str:
    """SHA-256 over all that a calibration depends on: the weights, and the tokenizer in the metadata.

    Raises CheckpointError for NaN or Inf.
    """

    def digest(tensor: SourceTensor) -> str:
        sha256 = hashlib.sha256()
        for first_row, raw in row_slabs(tensor):
            check_finite(tensor, first_row, raw)
            sha256.update(np.ascontiguousarray(raw).data)
        return sha256.hexdigest()

    tensors = model.tensors
    progress.start("reading the weights", sum(t.nbytes for t in tensors), "B")
    found = []
    with ThreadPoolExecutor(threads) as pool:
        for tensor, value in zip(tensors, pool.map(digest, tensors), strict=True):
            found.append([tensor.name, tensor.dtype.value, list(tensor.shape), value])
            progress.advance(tensor.nbytes, tensor.name)
    progress.finish()
    return hashlib.sha256(json.dumps([_metadata(model), found]).encode()).hexdigest()


def _metadata(model: SourceModel) -> str:
    return repr(dict(model.metadata))
