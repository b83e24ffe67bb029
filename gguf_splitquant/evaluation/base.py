"""One shape for all evaluations: records per item, kept on disk, then figures per model.

An evaluation splits its work into items (a chunk of text, a question, a round of timing). Each finished item
is a small JSON record that goes straight to a journal, so an interrupted run continues where it stopped, and
figures can be computed again without running a model. A summary sees the records of the baseline too,
because the interesting figures (KLD, flipped answers, speed ratio) are about pairs.

To add one: subclass :class:`Evaluation` (or :class:`PerModelEvaluation`), and list it in
``gguf_splitquant/evaluation/catalogue.py``.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from ..errors import EvaluationError
from ..progress import SILENT, Progress
from .journal import Journal

METRICS_VERSION = 1
"""Version of what the figures mean. Results with different versions are not to be compared.

1: llama-perplexity's protocol (BOS replaces the first token of a chunk, its second half is scored).
"""

Record = dict[str, Any]
"""What was measured on one item: anything JSON can hold, no larger than a few kilobytes."""


class Item(NamedTuple):
    """One finished piece of work.

    Attributes:
        model: index into the models of this run.
        key: name of the piece, unique within the evaluation, equal for all models ("chunk 12").
        record: what was measured.
    """

    model: int
    key: str
    record: Record


@dataclass(frozen=True)
class Figure:
    """A number for the table.

    Attributes:
        value: the estimate; None where it has no meaning (a baseline has no ratio to itself).
        error: half of its 95 % confidence interval, where the interval is symmetric.
        low, high: the interval, where it is not.
    """

    value: float | None
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self, form: str) -> str:
        """The figure with its uncertainty; ``form`` is a format specification."""
        if self.value is None:
            return "-"
        shown = format(self.value, form)
        if self.low is not None and self.high is not None:
            return f"{shown} [{format(self.low, form)}, {format(self.high, form)}]"
        return shown if self.error is None else f"{shown} ± {format(self.error, form)}"

    def to_json(self) -> dict[str, float | None]:
        """Only what is known."""
        fields = {"value": self.value, "error": self.error, "low": self.low, "high": self.high}
        return {name: value for name, value in fields.items() if value is not None or name == "value"}


@dataclass(frozen=True)
class Column:
    """How a figure is shown.

    Attributes:
        key: of the figure.
        title: head of the column.
        form: a format specification, such as ``.4f`` or ``.1%``.
        better: which direction is good, for the report's colours.
        about: one sentence for the report.
    """

    key: str
    title: str
    form: str = ".4f"
    better: Literal["lower", "higher", ""] = ""
    about: str = ""


@dataclass(frozen=True)
class ModelResult:
    """The figures of one model in one evaluation."""

    model: Path
    figures: Mapping[str, Figure]
    notes: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True)
class EvaluationResult:
    """The figures of all models in one evaluation; the first model is the baseline."""

    name: str
    version: int
    settings: Mapping[str, Any]
    columns: Sequence[Column]
    models: Sequence[ModelResult]

    def to_json(self) -> dict[str, Any]:
        """As it stands in a results file."""
        return {
            "version": self.version,
            "settings": dict(self.settings),
            "columns": [
                {"key": c.key, "title": c.title, "form": c.form, "better": c.better} for c in self.columns
            ],
            "models": [
                {
                    "file": str(result.model),
                    "figures": {key: figure.to_json() for key, figure in result.figures.items()},
                    "notes": list(result.notes),
                }
                for result in self.models
            ],
        }


class Evaluation(abc.ABC):
    """What every evaluation offers.

    Attributes:
        name: of the command (``arc``) and in results.
        version: raised when the same model would get other figures.
        about_baseline: a model's records depend on what the baseline is (not only its figures).
        columns: of the table, most important first.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    about_baseline: ClassVar[bool] = False
    columns: ClassVar[Sequence[Column]]

    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything but the model that determines the records, as JSON. No thread counts: they change
        time, and figures only within the noise."""

    @abc.abstractmethod
    def measure(
        self, models: Sequence[Path], done: Sequence[Mapping[str, Record]], progress: Progress
    ) -> Iterator[Item]:
        """Yield every item that is not in ``done`` (by model index and key), as soon as it is finished.

        Raises:
            EvaluationError, EngineError: naming the file that cannot be evaluated.
        """

    @abc.abstractmethod
    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        """Figures of one model, by column key. ``baseline`` are the first model's records, which for the
        first model itself is the same object as ``records``."""

    def notes(self, records: Mapping[str, Record]) -> Sequence[str]:
        """What a reader must know about these figures (positions left out, ...)."""
        return ()


class PerModelEvaluation(Evaluation):
    """An evaluation that finishes one model before the next."""

    def measure(
        self, models: Sequence[Path], done: Sequence[Mapping[str, Record]], progress: Progress
    ) -> Iterator[Item]:
        """See :meth:`Evaluation.measure`."""
        for index, model in enumerate(models):
            for key, record in self.measure_model(model, done[index], progress):
                yield Item(index, key, record)

    @abc.abstractmethod
    def measure_model(
        self, model: Path, done: Mapping[str, Record], progress: Progress
    ) -> Iterator[tuple[str, Record]]:
        """Yield key and record of every item of one model that is not in ``done``. Nothing is opened
        when all are done."""


def run_evaluation(
    evaluation: Evaluation,
    models: Sequence[Path],
    folder: Path,
    *,
    resume: bool = False,
    progress: Progress = SILENT,
) -> EvaluationResult:
    """Run one evaluation on some models; the first is the baseline.

    Args:
        evaluation: what to run.
        models: GGUF files.
        folder: for the journals; made if it is not there.
        resume: keep items that an earlier run with the same settings and files finished.
        progress: gets a bar per piece of long work.

    Raises:
        EvaluationError: no models, a file that is not there, the same file twice; and what the evaluation
            raises. Finished items stay in the journals.
    """
    if not models:
        raise EvaluationError("models", "none given", "name at least one GGUF file")
    for model in models:
        if not model.is_file():
            raise EvaluationError(model, "no such file", "give the path of a GGUF file")
    if len({model.resolve() for model in models}) != len(models):
        raise EvaluationError("models", "the same file is given twice", "name each file once")
    base = models[0] if evaluation.about_baseline else None
    journals = [Journal.open(folder, evaluation, model, resume=resume, baseline=base) for model in models]
    try:
        for item in evaluation.measure(models, [journal.records for journal in journals], progress):
            journals[item.model].add(item.key, item.record)
    finally:
        for journal in journals:
            journal.close()
    baseline = journals[0].records
    results = [
        ModelResult(model, evaluation.summarize(journal.records, baseline), evaluation.notes(journal.records))
        for model, journal in zip(models, journals, strict=True)
    ]
    return EvaluationResult(
        evaluation.name, evaluation.version, evaluation.settings(), evaluation.columns, results
    )
