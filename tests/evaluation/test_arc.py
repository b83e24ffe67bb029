"""ARC's arithmetic: shared work gives the same scores as no sharing, and figures follow from the scores."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.cli import main
from gguf_splitquant.errors import EvaluationError
from gguf_splitquant.evaluation import choice_scoring
from gguf_splitquant.evaluation.arc import ArcEasy, answer, arc, arc_from_file
from gguf_splitquant.evaluation.base import run_evaluation
from gguf_splitquant.evaluation.choice_scoring import (
    ChoiceRequest,
    common_prefix,
    encode_pair,
    log_sum_exp,
    score_choices,
    shared_prefix,
)
from gguf_splitquant.evaluation.divergence import log_softmax
from gguf_splitquant.evaluation.tasks import Question, write_questions
from gguf_splitquant.runtime.engine import Engine, EngineOptions

EXACT = EngineOptions(kv="f32", flash_attention=False, n_threads=1)
ONE_THREAD = EngineOptions(n_threads=1)

QUESTIONS = (
    Question("ball", "Lily has a ball. What does she like?", ("to play", "to fly", "rocks", "to sleep"), 0),
    Question("three", "What do birds do?", ("They fly.", "They swim.", "They read."), 0),
    Question("five", "Where do fish live?", ("in a tree", "in water", "in a car", "in", "in the sun"), 1),
    Question("one word", "What color is the sky?", ("blue", "red"), 0),
    Question("same", "Pick one.", ("a cat", "a cat", "a cat and a dog"), 2),
    Question("unicode", "Wie heißt das 🦙?", ("Lama", "ein Größenverhältnis", "≠"), 0),
)
EXAMPLES = (
    Question("e1", "Tom is sad. Why?", ("He lost his toy.", "He won."), 0),
    Question("e2", "Is the sun hot?", ("no", "yes"), 1),
)


def one_by_one(engine: Engine, request: ChoiceRequest) -> list[float]:
    """The plain way: every choice is a text of its own, all its logits at once."""
    scores = []
    for continuation in request.continuations:
        tokens = request.context + continuation
        first = len(request.context) - 1
        rows = np.concatenate([slab.logits.copy() for slab in engine.logits(tokens[:-1], first)])
        scores.append(float(log_softmax(rows)[np.arange(len(continuation)), list(continuation)].sum()))
    return scores


@pytest.mark.parametrize("recurrent", [False, True], ids=["attention", "recurrent"])
@pytest.mark.parametrize("examples", [(), EXAMPLES], ids=["zero-shot", "two-shot"])
def test_sharing_changes_no_score(
    float_gguf: Path, monkeypatch: pytest.MonkeyPatch, examples: tuple[Question, ...], recurrent: bool
) -> None:
    # branch by branch, as models with a state need it, gives the same with any model
    monkeypatch.setattr(Engine, "is_recurrent", recurrent)
    requests = ArcEasy(QUESTIONS, examples).requests(float_gguf, QUESTIONS)
    assert shared_prefix(requests) >= (30 if examples else 2)
    with Engine(float_gguf, replace(EXACT, n_ctx=256, n_batch=256)) as engine:
        expected = [one_by_one(engine, request) for request in requests]
    # many passes per batch, a few questions per batch, all questions in one
    for batch_tokens in (16, 48, 384):
        monkeypatch.setattr(choice_scoring, "BATCH_TOKENS", batch_tokens)
        monkeypatch.setattr(choice_scoring, "MAX_SEQUENCES", min(batch_tokens - 1, 100))
        scored = {request.key: scores for request, scores in score_choices(float_gguf, requests, EXACT)}
        assert len(scored) == len(requests)
        for request, alone in zip(requests, expected, strict=True):
            assert scored[request.key] == pytest.approx(alone, abs=2e-4), request.key


def test_equal_choices_have_equal_scores_and_the_first_wins(float_gguf: Path) -> None:
    (request,) = ArcEasy([QUESTIONS[4]]).requests(float_gguf, [QUESTIONS[4]])
    ((_, scores),) = score_choices(float_gguf, [request], EXACT)
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[2] < scores[0]
    assert answer({"logprobs": [-1.0, -1.0], "chars": [1, 1]}, False) == 0


def test_a_pair_is_cut_where_the_context_ends(float_gguf: Path) -> None:
    with Engine(float_gguf, EngineOptions(vocabulary_only=True)) as engine:
        context, continuation = encode_pair(engine, "Question: Why?\nAnswer:", " because")
        assert list(context + continuation) == engine.tokenize("Question: Why?\nAnswer: because").tolist()
        assert context[0] == engine.bos
        assert engine.detokenize(continuation).strip() == "because"
        with pytest.raises(EvaluationError, match="no token for ''"):
            encode_pair(engine, "Question:", "")


def test_the_prompt_is_the_harnesss(float_gguf: Path) -> None:
    (request,) = ArcEasy(QUESTIONS[:1], EXAMPLES).requests(float_gguf, QUESTIONS[:1])
    with Engine(float_gguf, EngineOptions(vocabulary_only=True)) as engine:
        text = engine.detokenize(request.context[1:])
        choices = [engine.detokenize(request.context[1:] + tail) for tail in request.continuations]
    assert text.strip() == (
        "Question: Tom is sad. Why?\nAnswer: He lost his toy.\n\n"
        "Question: Is the sun hot?\nAnswer: yes\n\n"
        "Question: Lily has a ball. What does she like?\nAnswer:"
    )
    assert choices == [f"{text} {choice}" for choice in QUESTIONS[0].choices]


def test_a_question_longer_than_the_context_is_named(float_gguf: Path) -> None:
    long = Question("long", "why? " * 200, ("a", "b"), 0)
    evaluation = ArcEasy([QUESTIONS[0], long])
    with pytest.raises(EvaluationError, match=r"float.*\.gguf: question long takes \d+ tokens, .* has 256"):
        list(evaluation.measure_model(float_gguf, {}, _Counting()))


class _Counting:
    def __init__(self) -> None:
        self.total = self.done = self.finished = 0

    def start(self, what: str, total: int, unit: str) -> None:
        self.total = total
        assert unit == "questions"

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount

    def finish(self) -> None:
        self.finished += 1


def test_two_files_are_compared_and_an_interrupted_run_goes_on(
    float_gguf: Path, int4_gguf: Path, tmp_path: Path
) -> None:
    evaluation = ArcEasy(QUESTIONS, EXAMPLES, engine=ONE_THREAD)
    models = [float_gguf, int4_gguf]
    progress = _Counting()
    result = run_evaluation(evaluation, models, tmp_path, progress=progress)
    assert (progress.total, progress.done, progress.finished) == (6, 12, 2)
    baseline, other = (model.figures for model in result.models)
    assert set(baseline) == set(other) == {column.key for column in evaluation.columns}
    assert baseline["acc_flips"].value is None
    flips, p = other["acc_flips"].value, other["acc_p"].value
    assert flips is not None and 0 <= flips <= 6
    assert p is not None and 0 < p <= 1
    assert other["acc"].low is not None and other["acc"].low <= other["acc"].value <= other["acc"].high

    # half of the second journal lost: only its questions are asked again
    (journal,) = tmp_path.glob(f"arc_easy-{int4_gguf.stem}-*.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:4]) + lines[4][:20])
    progress = _Counting()
    again = run_evaluation(evaluation, models, tmp_path, resume=True, progress=progress)
    assert (progress.total, progress.done) == (3, 3)
    for key, figure in again.models[1].figures.items():
        assert figure.to_json() == pytest.approx(other[key].to_json()), key

    # and with nothing lost, no model is opened
    progress = _Counting()
    run_evaluation(evaluation, models, tmp_path, resume=True, progress=progress)
    assert progress.total == 0


def test_records_stand_for_themselves(float_gguf: Path) -> None:
    """What two result files need to be compared without the data set is in each record."""
    ((key, record),) = ArcEasy(QUESTIONS[:1], engine=ONE_THREAD).measure_model(float_gguf, {}, _Counting())
    assert key == "ball"
    assert record["chars"] == [7, 6, 5, 8]
    assert record["gold"] == 0
    assert all(score < 0 for score in record["logprobs"])
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_settings_tell_questions_and_examples_apart() -> None:
    plain, solved = ArcEasy(QUESTIONS).settings(), ArcEasy(QUESTIONS, EXAMPLES).settings()
    assert (plain["shots"], solved["shots"]) == (0, 2)
    assert plain["data"] != solved["data"] != ArcEasy(QUESTIONS[1:], EXAMPLES).settings()["data"]


def test_published_examples_are_the_first_of_the_validation_split() -> None:
    evaluation = arc("arc_challenge", shots=2, limit=3)
    assert evaluation.name == "arc_challenge"
    assert [question.id for question in evaluation.examples] == ["Mercury_SC_407695", "Mercury_7103565"]
    assert len(evaluation.questions) == 3
    assert evaluation.questions[0].id == "Mercury_7175875"
    assert arc("arc_easy").settings()["questions"] == 2376
    with pytest.raises(EvaluationError, match="300 examples, and 299 are there"):
        arc("arc_challenge", shots=300)


def test_a_file_of_ones_own_gives_its_first_questions_as_examples(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    write_questions(QUESTIONS, path)
    evaluation = arc_from_file(path, shots=2, limit=3)
    assert evaluation.examples == QUESTIONS[:2]
    assert evaluation.questions == QUESTIONS[2:5]
    with pytest.raises(EvaluationError, match=r"mine\.jsonl: 6 examples of 6 questions leave none"):
        arc_from_file(path, shots=6)


def test_examples_that_give_the_answer_away_are_refused() -> None:
    with pytest.raises(EvaluationError, match="question three is among its own examples"):
        ArcEasy(QUESTIONS, QUESTIONS[1:2])
    with pytest.raises(EvaluationError, match="no questions to ask"):
        ArcEasy([])


def test_figures_follow_from_the_records() -> None:
    """Four questions by hand: acc by the sum, acc_norm per character, flips whether right or wrong."""

    def record(*logprobs: float, gold: int = 0) -> dict[str, object]:
        return {"logprobs": list(logprobs), "chars": [1, 10], "gold": gold}

    before = {"a": record(-1, -5), "b": record(-1, -5, gold=1), "c": record(-9, -2), "d": record(-9, -2)}
    after = {"a": record(-5, -1), "b": record(-5, -1, gold=1), "c": record(-9, -2), "d": record(-1, -2)}
    evaluation = ArcEasy(QUESTIONS)
    base = evaluation.summarize(before, before)
    assert base["acc"].value == 0.25
    # per character: a -1 / -0.5, b -1 / -0.5, c and d -9 / -0.2
    assert base["acc_norm"].value == 0.25
    figures = evaluation.summarize(after, before)
    assert figures["acc"].value == 0.5
    assert figures["acc_flips"].value == 3
    # gained b and d, lost a: p of 1 against 2 is 1
    assert figures["acc_p"].value == 1.0
    assert figures["acc_norm_flips"].value == 0


def test_broken_logits_are_wrong_answers_and_are_said() -> None:
    records = {
        "a": {"logprobs": [None, -1.0], "chars": [1, 1], "gold": 1},
        "b": {"logprobs": [-2.0, -1.0], "chars": [1, 1], "gold": 1},
    }
    evaluation = ArcEasy(QUESTIONS)
    assert evaluation.summarize(records, records)["acc"].value == 0.5
    assert evaluation.notes(records) == ["1 questions count as wrong: the logits were not finite"]
    assert evaluation.notes({"b": records["b"]}) == []


@given(st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), min_size=1, max_size=5))
def test_common_prefix_is_the_longest(texts: list[tuple[int, ...]]) -> None:
    length = common_prefix(texts)
    assert len({text[:length] for text in texts}) == 1
    assert min(map(len, texts)) == length or len({text[: length + 1] for text in texts}) > 1


@given(st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=300))
def test_log_sum_exp_is_exact_enough(values: list[float]) -> None:
    row = np.array(values, dtype=np.float32)
    wide = row.astype(np.float64)
    expected = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    assert log_sum_exp(row) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_log_sum_exp_of_broken_logits_is_nan(bad: float) -> None:
    assert np.isnan(log_sum_exp(np.array([0.0, bad, 1.0], dtype=np.float32)))


def test_the_command_asks_questions_of_ones_own(
    float_gguf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_questions(QUESTIONS, tmp_path / "own.jsonl")
    command = [
        "eval",
        "arc",
        str(float_gguf),
        "--data",
        str(tmp_path / "own.jsonl"),
        "--threads",
        "1",
        "--json",
    ]
    assert main([*command, "--shots", "2", "--journals", str(tmp_path)]) == 0
    evaluations = json.loads(capsys.readouterr().out)["evaluations"]
    assert list(evaluations) == ["arc_local"]
    assert evaluations["arc_local"]["models"][0]["figures"]["acc"]["value"] in {n / 4 for n in range(5)}
    assert main(["eval", "arc", str(float_gguf), "--data", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: no such file" in capsys.readouterr().err
