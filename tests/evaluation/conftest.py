"""The files that evaluations are tested on: true float, and quantized with no sub-layers, so that they run on
any llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_splitquant.recipe import Recipe
from tests.gguf_files import FLOAT, convert_once


@pytest.fixture(scope="session")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def float_gguf(stories15m: Path, models_folder: Path) -> Path:
    return convert_once(stories15m, models_folder, FLOAT, "float")


@pytest.fixture(scope="session")
def int8_gguf(stories15m: Path, models_folder: Path) -> Path:
    recipe = Recipe(k=1, bits=8, granularity="row")
    return convert_once(stories15m, models_folder, recipe, "int8")


@pytest.fixture(scope="session")
def int4_gguf(stories15m: Path, models_folder: Path) -> Path:
    recipe = Recipe(k=1, bits=4, granularity="block")
    return convert_once(stories15m, models_folder, recipe, "int4")
