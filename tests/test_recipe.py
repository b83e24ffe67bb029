"""A recipe travels in the file it made, so it must survive the way and refuse nonsense."""

from __future__ import annotations

import pytest

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.recipe import RECIPES, Recipe


@pytest.mark.parametrize(
    "recipe", [*RECIPES.values(), Recipe(layout="float", outtype="f32"), Recipe(k=8, bits=2)]
)
def test_json_round_trip(recipe: Recipe) -> None:
    assert Recipe.from_json(recipe.to_json()) == recipe


@pytest.mark.parametrize(
    "fields",
    [
        {"k": 0},
        {"k": 9},
        {"bits": 3},
        {"granularity": "column"},
        {"layout": "x"},
        {"outtype": "f8"},
        {"calibration": "web"},
    ],
)
def test_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError, match=next(iter(fields))):
        Recipe(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rank": 4}'])
def test_refuses_foreign_json(text: str) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_json(text)
