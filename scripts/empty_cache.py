"""A cache in which nothing is known, for runs that are to do everything anew."""

from __future__ import annotations

from pathlib import Path


def empty_cache(folder: Path, runtime: Path) -> Path:
    """Make ``folder`` a cache that has the llama.cpp of the folder ``runtime`` and nothing else."""
    folder.mkdir()
    (folder / "runtime").symlink_to(runtime)
    return folder
