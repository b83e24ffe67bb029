"""The snippet for a model card: fields that a hub reads, figures that are the file's and the evaluation's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation.base import Column, EvaluationResult, Figure, ModelResult
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.evaluation.results import collect
from gguf_splitquant.publishing.model_card import model_card, read_results
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources.model import SourceModel
from tests.sample_models import small_model


def named_model() -> SourceModel:
    model = small_model()
    pairs = {
        "general.name": "Small: a test",
        "general.license": "apache-2.0",
        "general.source.repo_url": "https://huggingface.co/org/Small",
    }
    text = {key: GGUFValue(value, GGUFValueType.STRING) for key, value in pairs.items()}
    languages = GGUFValue(["en", "de"], GGUFValueType.ARRAY, GGUFValueType.STRING)
    return dataclasses.replace(model, metadata={**model.metadata, **text, "general.languages": languages})


def test_fields_and_figures(tmp_path: Path) -> None:
    path = tmp_path / "paper.gguf"
    report = convert(named_model(), path, RECIPES["paper"])
    card = model_card(read_contents(path))
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "base_model": "org/Small",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
        "language": ["en", "de"],
        "quantized_by": "gguf-splitquant",
        "library_name": "gguf",
        "tags": ["gguf", "gguf-splitquant"],
    }
    assert "# Small: a test GGUF" in body and "build-runtime" in body
    (row,) = [line for line in body.splitlines() if line.startswith("| paper.gguf")]
    assert f"{report.total_bytes / 1e6:,.1f} MB" in row
    recipe = json.loads(body.partition("```json\n")[2].partition("\n```")[0])
    assert recipe.items() <= dataclasses.asdict(RECIPES["paper"]).items()
    assert "Measured" not in card


def test_a_file_that_runs_anywhere_and_a_float_file(tmp_path: Path) -> None:
    convert(small_model(), tmp_path / "plain.gguf", RECIPES["plain"])
    assert "runs in any llama.cpp" in model_card(read_contents(tmp_path / "plain.gguf"))
    convert(small_model(), tmp_path / "float.gguf", Recipe(layout="float"))
    assert "recipe" not in model_card(read_contents(tmp_path / "float.gguf"))


def test_measured_tables(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("float.gguf", "paper.gguf")]
    for path, recipe in zip(files, (Recipe(layout="float"), RECIPES["paper"]), strict=True):
        convert(small_model(), path, recipe)
    columns = [Column("kld", "KLD", ".4f"), Column("same", "same | choice", ".1%"), Column("x", "x")]
    results = [
        ModelResult(files[0], {"kld": Figure(None), "same": Figure(1.0)}, ()),
        ModelResult(files[1], {"kld": Figure(0.12345, 0.001), "same": Figure(0.5, low=0.4, high=0.6)}, ()),
    ]
    evaluation = EvaluationResult("kld", 1, {}, columns, results)
    output = tmp_path / "results.json"
    collect(files, [evaluation]).write(output)
    card = model_card(read_contents(files[1]), read_results(output))
    assert "### Divergence from the float model" in card
    assert "| file | KLD | same \\| choice | x |" in card
    assert "| float.gguf | - | 100.0% | - |" in card
    assert "| paper.gguf | 0.1235 \u00b1 0.0010 | 50.0% [40.0%, 60.0%] | - |" in card


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": "other"}', '{"format": "gguf-splitquant evaluation", "evaluations": [1]}',
     '{"format": "gguf-splitquant evaluation", "evaluations": {"kld": {"columns": 1}}}'],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"results\.json: not results of an evaluation"):
        read_results(path)
