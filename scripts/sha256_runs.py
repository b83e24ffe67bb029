"""The same bytes every time, shown: SHA-256 of what many processes make of one checkpoint.

Each process has other numbers of threads, of BLAS threads and another hash seed; calibrated ones start with
an empty cache, so that the model writes its text anew in each. A table of the digests is printed::

    python scripts/sha256_runs.py MODEL_DIR            # minutes for a small model
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gguf_splitquant.cache import cache_dir
from scripts.empty_cache import empty_cache

CONVERSIONS: dict[str, tuple[str, ...]] = {
    "float": ("--layout", "float"),
    "plain": ("--recipe", "plain"),
    "paper": ("--recipe", "paper"),
    "stock, no calibration": ("--recipe", "stock", "--no-calibration"),
    "split, no calibration": ("--recipe", "split", "--no-calibration"),
    "stock": ("--recipe", "stock"),
    "split": ("--recipe", "split"),
}
SETTINGS = ((1, 1, "0"), (2, 2, "1"), (3, 1, "2"), (7, 3, "random"))
"""Threads, BLAS threads, PYTHONHASHSEED."""


def digest(model: Path, *options: str, **environment: str) -> str:
    """SHA-256 of what a process of its own writes, with a cache that has the runtime only."""
    with tempfile.TemporaryDirectory(prefix="sha256-") as folder:
        out = Path(folder) / "out.gguf"
        cache = empty_cache(Path(folder) / "cache", cache_dir() / "runtime")
        command = [sys.executable, "-m", "gguf_splitquant", "convert", str(model), str(out), *options]
        setting = {**os.environ, "GGUF_SPLITQUANT_CACHE": str(cache), **environment}
        done = subprocess.run(command, env=setting, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stderr[-2000:]}")
        return hashlib.sha256(out.read_bytes()).hexdigest()


def run(model: Path, names: list[str]) -> int:
    """Print the table. Returns 1 if a conversion had more than one result."""
    rows = "; ".join(f"{threads}, {blas}, {seed}" for threads, blas, seed in SETTINGS)
    print(f"{model.name}; threads, BLAS threads, PYTHONHASHSEED: {rows}")
    print(f"{'conversion':<24} {'runs':>5} {'results':>8}  SHA-256")
    unequal = 0
    for name in names:
        found = [
            digest(
                model,
                *CONVERSIONS[name],
                f"--threads={threads}",
                OPENBLAS_NUM_THREADS=str(blas),
                PYTHONHASHSEED=seed,
            )
            for threads, blas, seed in SETTINGS
        ]
        different = list(dict.fromkeys(found))
        unequal |= len(different) > 1
        print(f"{name:<24} {len(found):>5} {len(different):>8}  {' '.join(different)}", flush=True)
    return int(unequal)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--conversions", nargs="+", choices=CONVERSIONS, default=list(CONVERSIONS))
    arguments = parser.parse_args()
    sys.exit(run(arguments.model.resolve(), arguments.conversions))
