"""A recipe travels in the file it made, so it must survive the way and refuse nonsense."""

from __future__ import annotations

import pytest

from gguf_splitquant import type_patterns
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
        {"layout": "split", "target_bpw": 1e300},
        {"layout": "split", "target_bpw": 10**400},
        {"layout": "split", "target_size": 10**400},
    ],
)
def test_refuses_nonsense(fields: dict[str, object]) -> None:
    with pytest.raises(RecipeError):
        Recipe(**fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{", '{"rank": 4}', "[" * 100_000, '{"k": true}', '{"bits": 4.0}', '{"layout": null}'),
        *('{"split_head": 1}', '{"avoid": "Q8_0"}', '{"avoid": [[]]}', '{"tensor_types": [["a"]]}'),
        *('{"tensor_types": ["ab"]}', '{"tensor_types": [["a", 1]]}', '"' + " " * (1 << 20) + '"'),
    ],
)
def test_refuses_foreign_json(text: str) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        Recipe.from_json(text)


def with_pattern(pattern: str) -> Recipe:
    return Recipe(layout="stock", qtype="Q4_0", tensor_types=((pattern, "Q8_0"),))


@pytest.mark.parametrize(
    ("pattern", "error"),
    [
        ("(", "is not a regular expression: missing \\)"),
        ("(?R)", "is not a regular expression: unknown extension"),
        ("a{99999999999999}", "repeats more than 1,000 times"),
        ("((a|b){999}){999}", "repeats more than 1,000 times"),
        ("(){9999}", "repeats more than 1,000 times"),
        ("(" * 249 + "*" + ")" * 249, "is not a regular expression: "),
        ("(" * 5000 + ")" * 5000, "has 10,000 characters, and 500 is the most"),
    ],
)
def test_patterns_have_limits(pattern: str, error: str) -> None:
    with pytest.raises(RecipeError, match=error):
        with_pattern(pattern)


@pytest.mark.timeout(60)
def test_patterns_do_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type_patterns, "_SECONDS", 0.2)
    with pytest.raises(RecipeError, match=r"\+\[!\?\]' takes longer than .* for blk.0.attn_v"):
        with_pattern("(.|.|.|.)+[!?]").fixed_type("blk.0.attn_v.weight")


def test_the_first_expression_that_finds_a_weight_decides() -> None:
    recipe = Recipe(layout="stock", qtype="Q4_0", tensor_types=(("attn_v", "Q8_0"), ("attn", "Q5_0")))
    assert [recipe.fixed_type(f"blk.0.{n}.weight") for n in ("attn_v", "attn_q", "ffn_up")] == [
        "Q8_0",
        "Q5_0",
        "Q4_0",
    ]
