"""Calibration of a checkpoint: the float model has to run, so it is a GGUF file for a while.

What that file's digest is, is remembered by the checkpoint's own files: the next conversion of the checkpoint
finds its calibration without writing the file again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from .. import __version__
from ..cache import cache_dir
from ..convert import convert
from ..errors import CheckpointError, OutputError
from ..file_plan import expected_bytes
from ..gguf_io.writer import free_bytes, write_failure
from ..locks import open_locked
from ..progress import SILENT, Progress
from ..recipe import OutType, Recipe
from ..resuming import files_identity
from ..runtime.library import load_llama_cpp
from ..sources.model import SourceModel
from .calibrate import Calibration, cached, calibrate
from .moments import Moments


def calibrate_model(
    model: SourceModel,
    folder: Path,
    how: Calibration | None = None,
    *,
    threads: int | None = None,
    spare_memory: bool = False,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Moments:
    """Statistics of every linear layer's input, from the cache where they are known.

    Args:
        model: the checkpoint; a 16-bit GGUF file is run as it is.
        folder: takes the float file of any other while the model runs: as large as the checkpoint in 16 bit.
        how: the text: by default the model's own.
        threads: None is all cores.
        spare_memory: see :func:`.calibrate.calibrate`.
        cache: folder for results; None: in the user's cache folder. Machines that share it calibrate once.
        progress: of writing the file, writing the text, and gathering.

    Raises:
        OutputError: the folder cannot hold the float file.
        EngineError: the runtime is missing, or the model does not run.
        CheckpointError: NaN or Inf in a weight.
    """
    how = how or Calibration()
    cache = cache or cache_dir() / "calibration"
    run = partial(
        calibrate, how=how, n_threads=threads, spare_memory=spare_memory, progress=progress, cache=cache
    )
    remembered = _Digest(model, cache) if model.files else None
    if remembered is not None and remembered.value:
        moments = cached(remembered.value, how, cache)
        if moments is not None:
            return moments
    if model.float_file is not None:
        digest = _sha256(model.float_file)
        if remembered is not None:
            remembered.keep(digest)
        return run(model.float_file, digest)
    with _float_folder(folder, remembered.name if remembered else "") as work:
        path = work / "float.gguf"
        if not path.exists():
            _check_room(model, folder)
            _write_float(model, path, threads, progress)
        digest = _sha256(path)
        if remembered is not None:
            remembered.keep(digest)
        return run(path, digest)


def _write_float(model: SourceModel, path: Path, threads: int | None, progress: Progress) -> None:
    # without files it leaves nothing to go on with: its folder is gone afterwards
    passing = dataclasses.replace(model, files=())
    try:
        recipe = Recipe(layout="float", outtype=_fastest_type())
        convert(passing, path, recipe, threads=threads, progress=progress)
    except CheckpointError:
        convert(passing, path, Recipe(layout="float", outtype="bf16"), threads=threads, progress=progress)


@contextmanager
def _float_folder(beside: Path, name: str) -> Iterator[Path]:
    """A folder for a while. What a killed run left of the same ``name`` is found again: a complete file."""
    place = beside / f".calibration-{name[:12]}"
    try:
        lock = open_locked(place.with_name(f"{place.name}.lock")) if name else None
    except OSError as error:
        raise write_failure(place, error) from error
    if lock is None:
        # a model in memory, or another process is at it
        with tempfile.TemporaryDirectory(dir=beside, prefix=".calibration-") as work:
            yield Path(work)
        return
    with lock:
        try:
            place.mkdir(exist_ok=True)
            for left in place.glob("*.partial"):
                left.unlink()
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


class _Digest:
    """The digest of a checkpoint's float file, remembered in the cache.

    Attributes:
        name: stands for the checkpoint's files.
        value: what is remembered; empty if nothing is.
    """

    def __init__(self, model: SourceModel, cache: Path) -> None:
        # the float file also holds the tokenizer and all else that is in the metadata
        about = [__version__, files_identity(model.files), repr(dict(model.metadata))]
        self.name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:32]
        self._path = cache / "checkpoints" / self.name
        try:
            self.value = self._path.read_text(encoding="ascii").strip()
        except OSError:
            self.value = ""

    def keep(self, value: str) -> None:
        """Remember. Raises OutputError where the cache cannot be written."""
        partial = self._path.with_name(f"{self._path.name}.{value[:8]}.partial")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(value + "\n", encoding="ascii")
            partial.replace(self._path)
        except OSError as error:
            fix = "free space, or set GGUF_SPLITQUANT_CACHE"
            raise OutputError(self._path, f"cannot be written: {error.strerror}", fix) from error


def _check_room(model: SourceModel, folder: Path) -> None:
    wanted, free = expected_bytes(model, Recipe(layout="float", outtype="f16")), free_bytes(folder)
    if free < wanted:
        cause = f"calibration runs the model from a temporary file of {wanted:,} bytes here, of {free:,} left"
        raise OutputError(folder, cause, "free some space, or pass --no-calibration")


def _fastest_type() -> OutType:
    """The 16-bit type that llama.cpp multiplies fastest on this processor.

    BF16 is 1.7 times as fast as F16 where there are instructions for it (measured at batches of 32), and a
    third slower elsewhere. Its rounding of activations, a millionth of their power, is nothing to statistics.
    """
    features: bytes = load_llama_cpp().llama_cpp.llama_print_system_info()
    return "bf16" if b"AVX512_BF16 = 1" in features else "f16"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
