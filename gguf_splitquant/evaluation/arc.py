"""ARC-Challenge and ARC-Easy by the protocol of lm-evaluation-harness, on GGUF files.

The protocol (tasks ``arc_challenge`` and ``arc_easy``, version 1.0, of lm-evaluation-harness 0.4): the
context is ``Question: ...\\nAnswer:``, every choice is scored by the log-likelihood of a space and its text.
``acc`` takes the most likely choice, ``acc_norm`` the most likely per character. Few-shot examples are the
first of the validation split, in order, for every question alike (the harness's ``fewshot_split:
validation`` and ``sampler: first_n``), so two runs never differ by their examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..errors import EvaluationError
from ..progress import Progress
from ..runtime.engine import Engine, EngineOptions
from .base import Column, Figure, PerModelEvaluation, Record
from .choice_scoring import ChoiceRequest, encode_pair, score_choices
from .significance import mcnemar, wilson_interval
from .tasks import Question, digest, load_questions
from .tasks_arc import ArcName, arc_questions


class MultipleChoice(PerModelEvaluation):
    """Questions answered by the most likely choice. Records hold ``logprobs``, ``chars`` and ``gold``.

    Args:
        questions: what to ask.
        examples: solved questions that stand before every one of them, in this order.
        engine: how models are opened; sizes of the context are chosen by the evaluation.

    Raises:
        EvaluationError: no questions, or a question that is among the examples.
    """

    version = 1
    columns: ClassVar[Sequence[Column]] = (
        Column("acc", "acc", ".1%", "higher", "Share of questions whose most likely choice is right."),
        Column("acc_norm", "acc_norm", ".1%", "higher", "The same with likelihood per character."),
        Column(
            "acc_flips", "flips", ".0f", "lower", "Answers that differ from the baseline's, right or wrong."
        ),
        Column("acc_p", "p", ".3f", "", "McNemar's exact p for acc: chance of such a difference by luck."),
        Column("acc_norm_flips", "norm flips", ".0f", "lower", "Answers per character that differ."),
        Column("acc_norm_p", "norm p", ".3f", "", "McNemar's exact p for acc_norm."),
    )

    def __init__(
        self,
        questions: Sequence[Question],
        examples: Sequence[Question] = (),
        *,
        engine: EngineOptions | None = None,
    ) -> None:
        if not questions:
            raise EvaluationError(self.name, "no questions to ask", "give a file that has some")
        if clash := {question.id for question in questions} & {example.id for example in examples}:
            raise EvaluationError(
                self.name,
                f"question {min(clash)} is among its own examples",
                "take examples from another split",
            )
        self.questions = tuple(questions)
        self.examples = tuple(examples)
        self.engine = engine or EngineOptions()
        self._preamble = "".join(
            f"{_prompt(example)} {example.choices[example.gold]}\n\n" for example in examples
        )

    def settings(self) -> dict[str, Any]:
        """See :meth:`Evaluation.settings`."""
        return {
            "protocol": "lm-evaluation-harness 0.4 multiple_choice",
            "questions": len(self.questions),
            "shots": len(self.examples),
            "data": digest([*self.examples, *self.questions]),
            "kv": self.engine.kv,
        }

    def requests(self, model: Path, questions: Sequence[Question]) -> list[ChoiceRequest]:
        """Questions as tokens of one model; only its vocabulary is read."""
        with Engine(model, EngineOptions(vocabulary_only=True)) as engine:
            requests = []
            for question in questions:
                context = self._preamble + _prompt(question)
                pairs = [encode_pair(engine, context, f" {choice}") for choice in question.choices]
                requests.append(ChoiceRequest(question.id, pairs[0][0], tuple(pair[1] for pair in pairs)))
            return requests

    def measure_model(
        self, model: Path, done: Mapping[str, Record], progress: Progress
    ) -> Iterator[tuple[str, Record]]:
        """See :meth:`PerModelEvaluation.measure_model`: one record per question."""
        pending = [question for question in self.questions if question.id not in done]
        if not pending:
            return
        progress.start(f"{self.name} {model.name}", len(pending), "questions")
        asked = {question.id: question for question in pending}
        for request, scores in score_choices(model, self.requests(model, pending), self.engine):
            question = asked[request.key]
            progress.advance(1, question.id)
            yield (
                question.id,
                {
                    # a millionth of a nat is far below the engine's own noise; JSON has no NaN
                    "logprobs": [round(score, 6) if math.isfinite(score) else None for score in scores],
                    "chars": [len(choice) for choice in question.choices],
                    "gold": question.gold,
                },
            )
        progress.finish()

    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        """See :meth:`Evaluation.summarize`. Flips and p-values are about questions that both models have."""
        figures: dict[str, Figure] = {}
        for metric, per_character in (("acc", False), ("acc_norm", True)):
            right = [answer(record, per_character) == record["gold"] for record in records.values()]
            low, high = wilson_interval(sum(right), len(right))
            figures[metric] = Figure(sum(right) / len(right), low=low, high=high)
            if records is baseline:
                figures[f"{metric}_flips"] = figures[f"{metric}_p"] = Figure(None)
                continue
            both = [key for key in records if key in baseline]
            before = [answer(baseline[key], per_character) for key in both]
            after = [answer(records[key], per_character) for key in both]
            gold = [records[key]["gold"] for key in both]
            test = mcnemar(
                [a == g for a, g in zip(before, gold, strict=True)],
                [a == g for a, g in zip(after, gold, strict=True)],
            )
            figures[f"{metric}_flips"] = Figure(sum(a != b for a, b in zip(before, after, strict=True)))
            figures[f"{metric}_p"] = Figure(test.p)
        return figures

    def notes(self, records: Mapping[str, Record]) -> Sequence[str]:
        """See :meth:`Evaluation.notes`."""
        broken = sum(None in record["logprobs"] for record in records.values())
        return [f"{broken} questions count as wrong: the logits were not finite"] if broken else []


def answer(record: Record, per_character: bool) -> int | None:
    """Index of the chosen answer, the first of equals; None where the model's logits were not finite."""
    if None in record["logprobs"]:
        return None
    scores = np.asarray(record["logprobs"])
    return int(np.argmax(scores / np.asarray(record["chars"]) if per_character else scores))


def _prompt(question: Question) -> str:
    return f"Question: {question.question}\nAnswer:"


class ArcChallenge(MultipleChoice):
    """The 1,172 questions that retrieval and word co-occurrence got wrong."""

    name = "arc_challenge"


class ArcEasy(MultipleChoice):
    """The other 2,376 questions."""

    name = "arc_easy"


class LocalQuestions(MultipleChoice):
    """Questions of one's own."""

    name = "arc_local"


def arc(
    name: ArcName,
    *,
    shots: int = 0,
    limit: int | None = None,
    engine: EngineOptions | None = None,
    cache: Path | None = None,
) -> MultipleChoice:
    """The evaluation on the published test split, its questions fetched if need be.

    Args:
        name: which set.
        shots: number of examples, the first of the validation split.
        limit: only the first so many questions.
        engine: how models are opened.
        cache: where questions are kept; the user cache by default.

    Raises:
        EvaluationError: the questions cannot be had, or there are fewer examples than ``shots``.
    """
    questions = arc_questions(name, cache=cache)
    examples = arc_questions(name, "validation", cache=cache) if shots else ()
    if not 0 <= shots <= len(examples):
        raise EvaluationError("--shots", f"{shots} examples, and {len(examples)} are there", "use fewer")
    kind = ArcChallenge if name == "arc_challenge" else ArcEasy
    return kind(questions[:limit], examples[:shots], engine=engine)


def arc_from_file(
    path: Path, *, shots: int = 0, limit: int | None = None, engine: EngineOptions | None = None
) -> MultipleChoice:
    """The same protocol on questions of one's own.

    Args:
        path: a ``.jsonl`` or ``.parquet`` file, see :func:`load_questions`.
        shots: number of examples: the first questions of the file, which are then not asked.
        limit: only the first so many of the questions after them.
        engine: how models are opened.

    Raises:
        EvaluationError: naming the file, and the line that cannot be used.
    """
    questions = load_questions(path)
    if not 0 <= shots < len(questions):
        raise EvaluationError(path, f"{shots} examples of {len(questions)} questions leave none", "use fewer")
    examples, asked = questions[:shots], questions[shots:]
    return LocalQuestions(asked[:limit], examples, engine=engine)
