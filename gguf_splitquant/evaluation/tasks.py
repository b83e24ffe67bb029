"""Multiple-choice questions: what one is, and how they are read from files.

Users bring data in the shapes that it is published in, so three are understood: the flat one that this
package keeps in its cache, the one of the data set on the Hugging Face hub, and that of AI2's own release.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import EvaluationError


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        id: unique within its file.
        question: its text.
        choices: the answers to choose from, two or more.
        gold: index of the right one.
    """

    id: str
    question: str
    choices: tuple[str, ...]
    gold: int


def load_questions(path: Path) -> tuple[Question, ...]:
    """Read a ``.jsonl`` or ``.parquet`` file.

    Each row is ``{"id", "question", "choices": [text, ...], "gold": index}``, or with ``"choices": {"text":
    [...], "label": [...]}, "answerKey": label`` (hub), or with ``"question": {"stem": text, "choices":
    [{"text", "label"}, ...]}, "answerKey": label`` (AI2's release).

    Raises:
        EvaluationError: naming the file and the line that cannot be used.
    """
    if not path.is_file():
        raise EvaluationError(path, "no such file", "give a .jsonl or .parquet file of questions")
    if path.suffix == ".parquet":
        rows = _parquet_rows(path)
    elif path.suffix in (".jsonl", ".json"):
        rows = _json_rows(path)
    else:
        raise EvaluationError(path, f"unknown kind of file {path.suffix!r}", "give a .jsonl or .parquet file")
    return parse_questions(rows, path)


def parse_questions(rows: Iterable[tuple[str, Any]], source: object) -> tuple[Question, ...]:
    """Questions from rows, each with its place (``line 12``).

    Raises:
        EvaluationError: naming ``source`` and the place.
    """
    questions: dict[str, Question] = {}
    for place, row in rows:
        try:
            question = _question(row, place)
            if question.id in questions:
                raise ValueError(f"the id {question.id!r} occurs twice")
        except ValueError as error:
            raise EvaluationError(
                f"{source}, {place}",
                str(error),
                "give it `id`, `question`, `choices` and `gold`",
            ) from error
        questions[question.id] = question
    if not questions:
        raise EvaluationError(source, "it has no questions", "give a file with one question a line")
    return tuple(questions.values())


def write_questions(questions: Sequence[Question], path: Path) -> None:
    """Write the flat shape of :func:`load_questions`, one question a line."""
    lines = (json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions)
    path.write_text("".join(lines), encoding="utf-8")


def digest(questions: Sequence[Question]) -> str:
    """Twelve hex digits that change with any word of any question."""
    text = json.dumps([asdict(question) for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                yield place, json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise EvaluationError(
                    f"{path}, {place}", f"not UTF-8 ({error.reason})", "save it as UTF-8"
                ) from error
            except json.JSONDecodeError as error:
                raise EvaluationError(
                    f"{path}, {place}", f"not JSON ({error})", "write one JSON object a line"
                ) from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise EvaluationError(path, "reading parquet needs pyarrow", "run `pip install pyarrow`") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, ValueError) as error:
        # pyarrow's own errors derive from these two
        raise EvaluationError(path, f"not a parquet file ({error})", "fetch it again") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"row {number}", row


def _question(row: Any, place: str) -> Question:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object, not {type(row).__name__}")
    text: Any = row.get("question")
    choices: Any = row.get("choices")
    if isinstance(text, dict):
        text, choices = text.get("stem"), text.get("choices")
    if not isinstance(text, str) or not text.strip():
        raise ValueError("no question (`question`)")
    texts, labels = _choices(choices)
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} choices (`choices`); a question needs two")
    for choice in texts:
        if not isinstance(choice, str) or not choice:
            raise ValueError(f"a choice must be a text that is not empty, not {choice!r}")
    identity = row.get("id")
    return Question(
        id=place if identity is None else str(identity),
        question=text,
        choices=tuple(texts),
        gold=_gold(row, labels, len(texts)),
    )


def _choices(choices: Any) -> tuple[list[Any], list[Any]]:
    """Texts and labels; without labels of their own they are numbered by letters."""
    if isinstance(choices, dict):
        texts, labels = choices.get("text"), choices.get("label")
        if isinstance(texts, list) and isinstance(labels, list) and len(texts) == len(labels):
            return texts, labels
    elif isinstance(choices, list):
        if any(isinstance(choice, dict) for choice in choices):
            pairs = [choice if isinstance(choice, dict) else {} for choice in choices]
            return [pair.get("text") for pair in pairs], [pair.get("label") for pair in pairs]
        return choices, [chr(ord("A") + index) for index in range(len(choices))]
    raise ValueError("`choices` is neither a list nor texts with their labels")


def _gold(row: dict[str, Any], labels: list[Any], count: int) -> int:
    gold, key = row.get("gold"), row.get("answerKey")
    if gold is not None:
        # True is an int in Python, and no index
        if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count:
            raise ValueError(f"the right answer (`gold`) is {gold!r}, not an index below {count}")
        return gold
    if key is None or key == "":
        raise ValueError("no right answer (`gold` or `answerKey`)")
    if key not in labels:
        raise ValueError(f"the right answer (`answerKey`) is {key!r}, not one of {labels}")
    return labels.index(key)
