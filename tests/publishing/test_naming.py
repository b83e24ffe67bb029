"""File names that say what is inside."""

from __future__ import annotations

import dataclasses

import pytest
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.publishing.naming import file_name
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources.model import FloatType
from tests.sample_models import small_model


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        (RECIPES["split"], "small-SplitQ4.9.gguf"),
        (RECIPES["stock"], "small-StockQ4.9.gguf"),
        (Recipe(layout="stock", target_bpw=5.25), "small-StockQ5.25.gguf"),
        (Recipe(layout="stock", target_bpw=6.0), "small-StockQ6.gguf"),
        (Recipe(layout="stock", qtype="Q8_0"), "small-Q8_0.gguf"),
        (RECIPES["paper"], "small-SplitQuantV2-k3-INT4.gguf"),
        (RECIPES["plain"], "small-INT4.gguf"),
        (Recipe(bits=32, k=2), "small-SplitQuantV2-k2-F32.gguf"),
        (Recipe(layout="float"), "small-BF16.gguf"),
        (Recipe(layout="float", outtype="f32"), "small-F32.gguf"),
    ],
)
def test_encodings(recipe: Recipe, name: str) -> None:
    recipe = dataclasses.replace(recipe, calibration="none")
    model = small_model(dtype=FloatType.BF16)
    assert file_name(model, plan_file(model, recipe)[0], "folder") == name


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("SmolLM2 135M Instruct", "SmolLM2-135M-Instruct-INT4.gguf"),
        ("../../etc/passwd", "etc-passwd-INT4.gguf"),
        ("a\x00b\nc", "a-b-c-INT4.gguf"),
        ("...", "model-INT4.gguf"),
        ("\u6f22" * 500, "\u6f22" * 33 + "-INT4.gguf"),
        ("x" * 500, "x" * 100 + "-INT4.gguf"),
    ],
)
def test_any_model_name_is_a_plain_file_name(name: str, file: str) -> None:
    model = small_model()
    value = GGUFValue(name, GGUFValueType.STRING)
    model = dataclasses.replace(model, metadata={**model.metadata, "general.name": value})
    assert file_name(model, plan_file(model, RECIPES["plain"])[0], "folder") == file


def test_without_a_name_the_source_is_one() -> None:
    model = dataclasses.replace(small_model(), metadata={})
    assert file_name(model, plan_file(model, RECIPES["plain"])[0], "My Model") == "My-Model-INT4.gguf"
