"""GGUF files for tests: stories15M, converted once for a whole run, and one that is hardly a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGUFWriter

from gguf_splitquant.convert import convert
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model


def convert_once(checkpoint: Path, folder: Path, recipe: Recipe, name: str) -> Path:
    """``checkpoint`` by ``recipe`` as ``folder/name.gguf``, unless it is there."""
    path = folder / f"{name}.gguf"
    if not path.exists():
        convert(open_model(checkpoint), path, recipe)
    return path


def one_tensor(path: Path, architecture: str, tensor: str) -> Path:
    """A sound GGUF file that says little of its model and holds one tensor, two rows of ones."""
    writer = GGUFWriter(path, architecture)
    writer.add_tensor(tensor, np.ones((2, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FLOAT = Recipe(layout="float", outtype="f32")
