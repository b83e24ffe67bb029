"""The loop around every evaluation: journals, resuming, interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from gguf_splitquant.errors import EvaluationError, OutputError
from gguf_splitquant.evaluation.base import Column, Figure, PerModelEvaluation, Record, run_evaluation
from gguf_splitquant.evaluation.journal import model_identity
from gguf_splitquant.progress import Progress


class Lengths(PerModelEvaluation):
    """Counts the letters of each line of a file."""

    name: ClassVar[str] = "lengths"
    columns: ClassVar = (Column("mean", "mean"), Column("ratio", "ratio"))

    def __init__(self, *, strict: bool = False, stop_at: str = "") -> None:
        self.strict = strict
        self.stop_at = stop_at
        self.measured: list[str] = []

    def settings(self) -> dict[str, Any]:
        return {"strict": self.strict}

    def measure_model(
        self, model: Path, done: Mapping[str, Record], progress: Progress
    ) -> Iterator[tuple[str, Record]]:
        for number, line in enumerate(model.read_text().splitlines()):
            if str(number) in done:
                continue
            if line == self.stop_at:
                raise KeyboardInterrupt
            self.measured.append(line)
            yield str(number), {"length": len(line)}

    def summarize(self, records: Mapping[str, Record], baseline: Mapping[str, Record]) -> dict[str, Figure]:
        mean, base = (sum(r["length"] for r in side.values()) / len(side) for side in (records, baseline))
        return {"mean": Figure(mean), "ratio": Figure(None if records is baseline else mean / base)}


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    (tmp_path / "a.txt").write_text("aa\nbbbb\nc")
    (tmp_path / "b.txt").write_text("dddd\neeee")
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


def test_figures_and_json(files: list[Path], tmp_path: Path) -> None:
    result = run_evaluation(Lengths(), files, tmp_path / "journals")
    assert [m.figures["mean"].value for m in result.models] == [pytest.approx(7 / 3), 4]
    assert result.models[0].figures["ratio"].value is None
    document = json.loads(json.dumps(result.to_json()))
    assert document["models"][1]["figures"] == {
        "mean": {"value": 4},
        "ratio": {"value": pytest.approx(12 / 7)},
    }


def test_resume_measures_only_what_is_missing(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "journals"
    interrupted = Lengths(stop_at="eeee")
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(interrupted, files, folder)
    assert interrupted.measured == ["aa", "bbbb", "c", "dddd"]
    resumed = Lengths()
    result = run_evaluation(resumed, files, folder, resume=True)
    assert resumed.measured == ["eeee"]
    assert result.models == run_evaluation(Lengths(), files, tmp_path / "other").models
    again = Lengths()
    run_evaluation(again, files, folder, resume=True)
    assert again.measured == []
    anew = Lengths()
    run_evaluation(anew, files, folder)
    assert len(anew.measured) == 5


def test_a_line_cut_short_by_an_interruption_is_measured_again(files: list[Path], tmp_path: Path) -> None:
    run_evaluation(Lengths(), files[:1], tmp_path / "j")
    (journal,) = (tmp_path / "j").iterdir()
    journal.write_text(journal.read_text()[:-5])
    resumed = Lengths()
    run_evaluation(resumed, files[:1], tmp_path / "j", resume=True)
    assert resumed.measured == ["c"]


def test_other_settings_or_another_file_never_meet_old_records(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "journals"
    run_evaluation(Lengths(), files, folder)
    strict = Lengths(strict=True)
    run_evaluation(strict, files, folder, resume=True)
    assert len(strict.measured) == 5
    files[1].write_text("dddd\neeee\nf")
    changed = Lengths()
    run_evaluation(changed, files, folder, resume=True)
    assert changed.measured == ["dddd", "eeee", "f"]


def test_a_damaged_journal_is_named(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "j"
    run_evaluation(Lengths(), files[:1], folder)
    (journal,) = folder.iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    for damage in (["{}\n", *lines[1:]], [lines[0], "nonsense\n", *lines[1:]], [lines[0], "[1]\n"]):
        journal.write_text("".join(damage))
        with pytest.raises(EvaluationError, match=rf"{journal.name}: not a journal.*without --resume"):
            run_evaluation(Lengths(), files[:1], folder, resume=True)


def test_bad_arguments(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="models: none given"):
        run_evaluation(Lengths(), [], tmp_path)
    with pytest.raises(EvaluationError, match=r"gone\.gguf: no such file"):
        run_evaluation(Lengths(), [files[0], tmp_path / "gone.gguf"], tmp_path)
    with pytest.raises(EvaluationError, match="given twice"):
        run_evaluation(Lengths(), [files[0], files[0]], tmp_path)
    with pytest.raises(OutputError, match="cannot write"):
        run_evaluation(Lengths(), files, files[0] / "folder")


def test_a_model_in_shards_is_known_by_all_of_them(tmp_path: Path) -> None:
    shards = [tmp_path / f"m-0000{i}-of-00002.gguf" for i in (1, 2)]
    for shard in shards:
        shard.write_bytes(b"1234")
    before = model_identity(shards[0])
    assert before["bytes"] == 8
    shards[1].write_bytes(b"12345")
    assert model_identity(shards[0]) != before
