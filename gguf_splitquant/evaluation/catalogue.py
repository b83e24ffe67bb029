"""Which evaluations there are, and what ``all`` means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.engine import EngineOptions
from .arc import arc, arc_from_file
from .base import Evaluation
from .kld import KLDivergence
from .perplexity import Perplexity
from .speed import Speed, SpeedOptions
from .text_evaluation import TextOptions


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of all evaluations together.

    Attributes:
        text: for KLD and perplexity.
        speed: for speed.
        engine: for ARC.
        shots: examples in front of an ARC question.
        limit_questions: only the first so many questions of each ARC set.
        questions: a file of questions instead of the ARC sets.
        cache: folder for what is fetched or kept for later runs; None is the user cache.
    """

    text: TextOptions
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    engine: EngineOptions = field(default_factory=EngineOptions)
    shots: int = 0
    limit_questions: int | None = None
    questions: Path | None = None
    cache: Path | None = None


def _arc(options: EvaluationOptions) -> list[Evaluation]:
    if options.questions is not None:
        return [
            arc_from_file(
                options.questions, shots=options.shots, limit=options.limit_questions, engine=options.engine
            )
        ]
    return [
        arc(
            name,
            shots=options.shots,
            limit=options.limit_questions,
            engine=options.engine,
            cache=options.cache,
        )
        for name in ("arc_challenge", "arc_easy")
    ]


def _kld(options: EvaluationOptions) -> list[Evaluation]:
    return [KLDivergence(options.text, cache=options.cache and options.cache / "baselines")]


def _ppl(options: EvaluationOptions) -> list[Evaluation]:
    return [Perplexity(options.text)]


def _speed(options: EvaluationOptions) -> list[Evaluation]:
    return [Speed(options.speed)]


def _all(options: EvaluationOptions) -> list[Evaluation]:
    # KLD shows perplexity too, so it does not run twice
    return [*_kld(options), *_arc(options), *_speed(options)]


CATALOGUE: Mapping[str, Callable[[EvaluationOptions], Sequence[Evaluation]]] = {
    "kld": _kld,
    "ppl": _ppl,
    "arc": _arc,
    "speed": _speed,
    "all": _all,
}
"""Names on the command line, and the evaluations that they run."""
