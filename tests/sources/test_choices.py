"""Choices are scored right on models that keep a state: their texts cannot share a token."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gguf_splitquant.convert import convert
from gguf_splitquant.evaluation.choice_scoring import ChoiceRequest, score_choices
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.engine import Engine
from gguf_splitquant.sources import open_model
from tests.evaluation.test_arc import EXACT, one_by_one

from .family_cases import FAMILY_CASES

pytestmark = [pytest.mark.oracle, pytest.mark.engine]

CONTEXT = (21, 34, 55, 30)
REQUESTS = [
    # the first choice ends where the others go on; two share their beginning
    ChoiceRequest("ends", (*CONTEXT, 40), ((50,), (50, 51), (50, 52, 53), (60, 61))),
    ChoiceRequest("shares a context", (*CONTEXT, 40, 41), ((50, 51), (62, 63, 64))),
    ChoiceRequest("other", (*CONTEXT, 42), ((70, 71, 72), (73,))),
]


@pytest.mark.parametrize(("name", "recurrent"), [("Mamba", True), ("Llama", False)])
def test_choices_equal_texts_alone(official_files: Path, tmp_path: Path, name: str, recurrent: bool) -> None:
    model = open_model(official_files / name, pre_tokenizer=FAMILY_CASES[name].pre)
    path = convert(model, tmp_path / "f32.gguf", Recipe(layout="float", outtype="f32")).path
    found = {request.key: scores for request, scores in score_choices(path, REQUESTS, EXACT)}
    with Engine(path, replace(EXACT, n_ctx=64, n_batch=64)) as engine:
        assert engine.is_recurrent == recurrent
        for request in REQUESTS:
            assert found[request.key] == pytest.approx(one_by_one(engine, request), abs=2e-4), request.key
