"""Calibration of a checkpoint: the float model has to run, so it is a GGUF file for a while."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from ..convert import convert
from ..errors import CheckpointError
from ..progress import SILENT, Progress
from ..recipe import OutType, Recipe
from ..runtime.library import load_llama_cpp
from ..sources.model import SourceModel
from .calibrate import Calibration, calibrate
from .moments import Moments


def calibrate_model(
    model: SourceModel,
    folder: Path,
    how: Calibration | None = None,
    *,
    threads: int | None = None,
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Moments:
    """Statistics of every linear layer's input, from the cache where they are known.

    Args:
        model: the checkpoint; a 16-bit GGUF file is run as it is.
        folder: takes the float file of any other while the model runs: as large as the checkpoint in 16 bit.
        how: the text: by default the model's own.
        threads: None is all cores.
        cache: folder for results; None: in the user's cache folder.
        progress: of writing the file, writing the text, and gathering.

    Raises:
        OutputError: the folder cannot hold the float file.
        EngineError: the runtime is missing, or the model does not run.
        CheckpointError: NaN or Inf in a weight.
    """
    if model.float_file is not None:
        return calibrate(
            model.float_file, _sha256(model.float_file), how, n_threads=threads, progress=progress
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix=".calibration-") as work:
        path = Path(work) / "float.gguf"
        try:
            recipe = Recipe(layout="float", outtype=_fastest_type())
            convert(model, path, recipe, threads=threads, progress=progress)
        except CheckpointError:
            convert(model, path, Recipe(layout="float", outtype="bf16"), threads=threads, progress=progress)
        return calibrate(path, _sha256(path), how, n_threads=threads, progress=progress, cache=cache)


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
