"""A recipe travels in the file it made, so it must survive the way and refuse nonsense."""

from __future__ import annotations

import pytest

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.recipe import RECIPES, Recipe


@pytest.mark.parametrize(
    "recipe",
    [
        *RECIPES.values(),
        Recipe(layout="float", outtype="f32"),
        Recipe(k=8, bits=2),
        Recipe(layout="split", target_size=10**9, tensor_types=(("attn_v", "Q8_0"),)),
        Recipe(layout="stock", target_bpw=4.9, avoid=("IQ4_NL", "IQ4_XS")),
    ],
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
        {"layout": "stock"},
        {"layout": "stock", "qtype": "Q4_0", "target_bpw": 4.5},
        {"layout": "stock", "qtype": "IQ4_NL", "avoid": ("IQ4_NL",)},
        {"layout": "stock", "target_bpw": 4.5, "embedding": "Q8_0", "avoid": ("Q8_0",)},
        {"layout": "split", "qtype": "Q4_0"},
        {"layout": "split", "target_bpw": -1.0},
        {"layout": "split", "target_size": 0},
        {"layout": "value", "target_bpw": 4.5},
        {"layout": "split", "target_bpw": 4.5, "tensor_types": (("(", "Q8_0"),)},
        {"layout": "split", "target_bpw": 4.5, "embedding": "Q9"},
    ],
)
def test_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Recipe(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rank": 4}'])
def test_refuses_foreign_json(text: str) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_json(text)


def test_the_first_expression_that_finds_a_weight_decides() -> None:
    recipe = Recipe(layout="stock", qtype="Q4_0", tensor_types=(("attn_v", "Q8_0"), ("attn", "Q5_0")))
    assert [recipe.fixed_type(f"blk.0.{n}.weight") for n in ("attn_v", "attn_q", "ffn_up")] == [
        "Q8_0",
        "Q5_0",
        "Q4_0",
    ]
