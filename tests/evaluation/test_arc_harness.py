"""ARC against its reference, lm-evaluation-harness with the HF backend on the same float weights.

Needs the extra ``eval-oracle``; the harness takes ten minutes on two cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from gguf_splitquant.evaluation.arc import answer, arc
from gguf_splitquant.evaluation.base import run_evaluation
from gguf_splitquant.evaluation.journal import Journal
from gguf_splitquant.evaluation.tasks import Question
from gguf_splitquant.evaluation.tasks_arc import arc_questions
from tests.gguf_files import FLOAT, convert_once

pytestmark = [
    pytest.mark.slow,
    pytest.mark.oracle,
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra eval-oracle"),
]


def _hub_shape(questions: Sequence[Question], path: Path) -> Path:
    def row(question: Question) -> dict[str, object]:
        labels = [chr(ord("A") + index) for index in range(len(question.choices))]
        choices = {"text": list(question.choices), "label": labels}
        return {
            "id": question.id,
            "question": question.question,
            "choices": choices,
            "answerKey": labels[question.gold],
        }

    path.write_text("".join(json.dumps(row(question)) + "\n" for question in questions))
    return path


@pytest.mark.parametrize(("limit", "shots"), [(300, 0), (40, 5)])
def test_the_harness_chooses_the_same_answers(smollm2: Path, tmp_path: Path, limit: int, shots: int) -> None:
    model = convert_once(smollm2, tmp_path, FLOAT, "float")
    evaluation = arc("arc_challenge", limit=limit, shots=shots)
    result = run_evaluation(evaluation, [model], tmp_path / "ours")
    with Journal.open(tmp_path / "ours", evaluation, model, resume=True) as journal:
        ours = dict(journal.records)

    script = Path(__file__).with_name("harness_run.py")
    test = _hub_shape(arc_questions("arc_challenge"), tmp_path / "test.jsonl")
    validation = _hub_shape(arc_questions("arc_challenge", "validation"), tmp_path / "validation.jsonl")
    out = tmp_path / "theirs.json"
    command = [sys.executable, script, smollm2, test, validation, limit, shots, out]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "datasets")}
    subprocess.run([str(word) for word in command], check=True, env=env, capture_output=True)
    theirs = json.loads(out.read_text())

    assert list(theirs["scores"]) == list(ours)
    noise = max(np.abs(np.subtract(theirs["scores"][key], ours[key]["logprobs"])).max() for key in ours)
    # the default KV cache is F16, and llama.cpp's sums run in another order than torch's
    assert noise < 0.05
    for metric, per_character in (("acc", False), ("acc_norm", True)):
        differing = 0
        for key, record in ours.items():
            reference = {**record, "logprobs": theirs["scores"][key]}
            mine, other = answer(record, per_character), answer(reference, per_character)
            if mine != other:
                differing += 1
                # explained: the reference's own two best are closer together than the noise of both
                scale = np.asarray(record["chars"]) if per_character else np.ones(len(record["chars"]))
                scores = np.asarray(reference["logprobs"]) / scale
                assert scores[other] - scores[mine] <= 2 * noise / scale.min(), key
        assert differing <= 0.005 * limit, metric
        assert result.models[0].figures[metric].value == pytest.approx(theirs["metrics"][metric], abs=0.005)
