"""GGUF files for tests that run models: stories15M, converted once for a whole run of the tests."""

from __future__ import annotations

from pathlib import Path

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model


def convert_once(checkpoint: Path, folder: Path, recipe: Recipe, name: str) -> Path:
    """``checkpoint`` by ``recipe`` as ``folder/name.gguf``, unless it is there."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        convert(open_model(checkpoint), path, recipe)
    return path


FLOAT = Recipe(layout="float", outtype="f32")
