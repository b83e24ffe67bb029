"""The same bytes every time: real processes with other thread counts, hash seeds and BLAS kernels."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.mixture import write_mixture
from scripts.sha256_runs import digest

RECIPES = {
    "value": ["--recipe", "paper"],
    "stock": ["--recipe", "stock", "--no-calibration", "--target-bpw", "4.9"],
}
RUNS = [(1, "0"), (2, "1"), (3, "random")]
"""Threads and PYTHONHASHSEED."""


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_threads_and_hash_seeds(recipe: str, stories15m: Path) -> None:
    found = {
        digest(stories15m, *RECIPES[recipe], f"--threads={threads}", PYTHONHASHSEED=seed)
        for threads, seed in RUNS
    }
    assert len(found) == 1


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_blas_kernels_and_processors_without_calibration(
    recipe: str, stories15m: Path, tmp_path: Path
) -> None:
    """No sum of these files is BLAS's, and the compiled loops have one order of operations."""
    if platform.machine() != "x86_64":
        pytest.skip("kernels of other processors cannot be chosen here")
    older = {
        "OPENBLAS_CORETYPE": "Prescott",
        "NUMBA_CPU_NAME": "nehalem",
        "NUMBA_CPU_FEATURES": "+sse4.2",
        "NUMBA_CACHE_DIR": str(tmp_path / "numba"),
        "NPY_DISABLE_CPU_FEATURES": "AVX512_ICL,X86_V4,X86_V3",
    }
    assert digest(stories15m, *RECIPES[recipe]) == digest(stories15m, *RECIPES[recipe], **older)


CALIBRATED = """
import sys
from pathlib import Path
from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.calibration.sensitivity import Probing
from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import RECIPES
from gguf_splitquant.sources import open_model

checkpoint, folder, threads = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
model = open_model(checkpoint)
how = Calibration(own=OwnText(sequences=4, length=96), probing=Probing(texts=1, length=48, layers=2))
statistics = calibrate_model(model, how, threads=threads, cache=folder / "cache")
for recipe in ("split", "stock"):
    convert(model, folder / f"{recipe}.gguf", RECIPES[recipe], statistics=statistics, threads=threads)
"""


@pytest.mark.engine
@pytest.mark.parametrize("experts", [0, 4])
def test_calibration_and_the_split_that_follows(experts: int, stories15m: Path, tmp_path: Path) -> None:
    """Nothing cached: the model writes its text anew in every process."""
    model = stories15m
    if experts:
        model = tmp_path / "mixture"
        write_mixture(stories15m, model, experts, 2)
    found = set()
    for threads, seed in RUNS:
        folder = tmp_path / str(threads)
        folder.mkdir()
        command = [sys.executable, "-c", CALIBRATED, model, folder, str(threads)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OPENBLAS_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(
            tuple(hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.gguf")))
        )
    assert len(found) == 1
