"""The journal: true whatever was cut off, for this conversion only, and for one process at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import CheckpointError, OutputError
from gguf_splitquant.gguf_io.journal import Journal, check_not_interrupted, journal_path
from gguf_splitquant.gguf_io.sharding import Shards
from gguf_splitquant.gguf_io.writer import PartialFile
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.resuming import recorded_plan
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import SourceModel
from tests.sources.handmade import write_checkpoint

STOCK = Recipe(layout="stock", target_bpw=6.0, calibration="none")
"""Plans, and quantizes nothing: rows of 16 are no block."""


HEAD = '{"journal":1,"files":%s,"settings":%s,"refined":null}\n'


def nothing(_files: set[int]) -> None:
    """Stands for the disk."""


@pytest.fixture
def model(tmp_path: Path) -> SourceModel:
    return open_model(write_checkpoint(tmp_path / "model"))


def interrupted(model: SourceModel, after: int, stop: Callable[[], BaseException]) -> SourceModel:
    """The model with a tensor that cannot be read before others are complete."""
    tensors = list(model.tensors)

    def read(_start: int, _stop: int) -> None:
        raise stop()

    tensors[after] = dataclasses.replace(tensors[after], read_rows=read)
    return dataclasses.replace(model, tensors=tuple(tensors))


@settings(max_examples=60)
@given(
    records=st.lists(
        st.tuples(st.text(min_size=1, max_size=20), st.none() | st.floats(0, 1, width=64)), max_size=8
    ),
    cut=st.integers(0, 400),
)
def test_what_is_cut_off_anywhere_is_read_up_to_there(
    tmp_path_factory: pytest.TempPathFactory, records: list[tuple[str, float | None]], cut: int
) -> None:
    out = tmp_path_factory.mktemp("journal") / "out.gguf"
    head = {"files": ["out.gguf"], "settings": {"a": 1}, "refined": None}
    with Journal.open(out) as journal:
        journal.begin(head)
        for name, error in records:
            journal.add(name, error, {0}, nothing)
    data = journal_path(out).read_bytes()
    journal_path(out).write_bytes(data[:cut])
    whole = data[:cut].count(b"\n")
    with Journal.open(out) as journal:
        assert journal.head == (head if whole else None)
        assert journal.done == dict(records[: max(0, whole - 1)])
        if whole:
            journal.add("one more", 0.25, {0}, nothing)
    if whole:
        with Journal.open(out) as journal:
            assert journal.done == {**dict(records[: whole - 1]), "one more": 0.25}


def test_data_is_on_disk_before_the_journal_says_so(tmp_path: Path) -> None:
    said: list[int] = []
    with Journal.open(tmp_path / "out.gguf") as journal:
        journal.begin({})

        def sync(files: set[int]) -> None:
            assert files == {3}
            said.append(journal.path.read_bytes().count(b"\n"))

        journal.add("a", None, {3}, sync)
        journal.add("b", None, {3}, sync)
    assert said == [1, 2]


def test_tensors_that_come_together_share_a_round(tmp_path: Path) -> None:
    rounds: list[set[int]] = []
    started, others = threading.Event(), threading.Event()

    def slow(files: set[int]) -> None:
        rounds.append(files)
        started.set()
        others.wait()

    with Journal.open(tmp_path / "out.gguf") as journal:
        journal.begin({})
        first = threading.Thread(target=journal.add, args=("first", None, {0}, slow))
        first.start()
        started.wait()
        for i in range(5):
            journal.add(f"later {i}", None, {i}, slow)
        others.set()
        first.join()
        assert rounds == [{0}, {0, 1, 2, 3, 4}]
        assert len(journal.done) == 6 and len(journal.path.read_text().splitlines()) == 7


def test_one_process_at_a_time(tmp_path: Path, model: SourceModel) -> None:
    out = tmp_path / "out.gguf"
    with Journal.open(out):
        for action in (
            lambda: Journal.open(out),
            lambda: check_not_interrupted(out),
            lambda: convert(model, out, STOCK, force=True),
        ):
            with pytest.raises(OutputError, match=r"out\.gguf: another process is writing it"):
                action()
    convert(model, out, STOCK)
    assert not journal_path(out).exists()


@pytest.mark.parametrize(
    "text",
    [
        "[]\n",
        "{}\n",
        '{"journal": 2}\n',
        "nonsense\n",
        "[" * 100_000 + "]" * 100_000 + "\n",
        HEAD % (5, "{}"),
        HEAD % ('[""]', "{}"),
        HEAD % ('["../other.gguf"]', "{}"),
        HEAD % ("[]", "[]"),
        HEAD % ("[]", "null"),
        HEAD % ("[]", "{}") + '{"tensor":1}\n',
        HEAD % ("[]", "{}") + '{"tensor":"x","error":1' + 400 * "0" + "}\n",
        HEAD % ("[]", "{}") + '{"tensor":"x","error":NaN}\n',
    ],
)
def test_what_is_no_journal_is_refused_unless_forced(tmp_path: Path, model: SourceModel, text: str) -> None:
    out = tmp_path / "out.gguf"
    journal_path(out).write_text(text + "\n")
    with pytest.raises(OutputError, match=r"out\.gguf\.journal: damaged: .*--force"):
        convert(model, out, STOCK, resume=True)
    convert(model, out, STOCK, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf"]


def test_a_journal_is_not_written_through_a_link(tmp_path: Path, model: SourceModel) -> None:
    mine = tmp_path / "mine"
    mine.write_text("precious")
    journal_path(tmp_path / "out.gguf").symlink_to(mine)
    with pytest.raises(OutputError, match="cannot be written"):
        convert(model, tmp_path / "out.gguf", STOCK, force=True)
    assert mine.read_text() == "precious"


def test_a_partial_file_without_a_journal_is_somebody_elses(tmp_path: Path, model: SourceModel) -> None:
    other = tmp_path / "out.gguf.partial"
    other.write_bytes(b"theirs")
    with pytest.raises(OutputError, match=r"out\.gguf\.partial: exists, and no journal"):
        convert(model, tmp_path / "out.gguf", STOCK)
    assert other.read_bytes() == b"theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf.partial"]
    convert(model, tmp_path / "out.gguf", STOCK, force=True)


def test_an_interruption_keeps_what_is_complete(tmp_path: Path, model: SourceModel) -> None:
    out, whole = tmp_path / "out.gguf", tmp_path / "whole.gguf"
    convert(model, whole, STOCK)
    with pytest.raises(KeyboardInterrupt):
        convert(interrupted(model, 3, KeyboardInterrupt), out, STOCK, threads=1)
    with Journal.open(out) as journal:
        # the thread may have taken up one more before it was stopped
        assert list(journal.done)[:3] == [t.name for t in model.tensors[:3]]
        assert model.tensors[3].name not in journal.done
    with pytest.raises(OutputError, match=r"has left [34] of its tensors here; pass --resume"):
        convert(model, out, STOCK)
    # a second interruption adds to the first
    with pytest.raises(MemoryError):
        convert(interrupted(model, 6, MemoryError), out, STOCK, threads=1, resume=True)
    # nothing that is complete is read again
    convert(interrupted(model, 0, AssertionError), out, STOCK, resume=True)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf", "whole.gguf"]


def test_what_is_wrong_with_the_model_leaves_nothing(tmp_path: Path, model: SourceModel) -> None:
    wrong = interrupted(model, 4, lambda: CheckpointError("t", "NaN"))
    with pytest.raises(CheckpointError):
        convert(wrong, tmp_path / "out.gguf", STOCK, threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]

    def unreadable() -> BaseException:
        error = CheckpointError("t", "reading failed")
        error.__cause__ = OSError(5, "Input/output error")
        return error

    with pytest.raises(CheckpointError):  # a network drive that comes back
        convert(interrupted(model, 4, unreadable), tmp_path / "out.gguf", STOCK, threads=1)
    convert(model, tmp_path / "out.gguf", STOCK, resume=True)


def test_a_model_in_memory_cannot_be_recognized(tmp_path: Path, model: SourceModel) -> None:
    unknown = dataclasses.replace(interrupted(model, 4, KeyboardInterrupt), files=())
    with pytest.raises(KeyboardInterrupt):
        convert(unknown, tmp_path / "out.gguf", STOCK, threads=1)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


Command = tuple[Path, Recipe, Shards]


def other_recipe(folder: Path, out: Path) -> Command:
    return folder, dataclasses.replace(STOCK, target_bpw=5.0), Shards()


def other_shards(folder: Path, out: Path) -> Command:
    return folder, STOCK, Shards(most_bytes=10**9)


def other_weights(folder: Path, out: Path) -> Command:
    path = folder / "model.safetensors"
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return folder, STOCK, Shards()


def other_tokenizer(folder: Path, out: Path) -> Command:
    text = (folder / "tokenizer_config.json").read_text()
    roles = json.loads(text)
    (folder / "tokenizer_config.json").write_text(json.dumps({**roles, "add_bos_token": False}))
    return folder, STOCK, Shards()


def other_version(folder: Path, out: Path) -> Command:
    journal = journal_path(out)
    journal.write_text(journal.read_text().replace("gguf-splitquant ", "gguf-splitquant 9.", 1))
    return folder, STOCK, Shards()


def no_partial(folder: Path, out: Path) -> Command:
    (out.parent / "out.gguf.partial").unlink()
    return folder, STOCK, Shards()


def short_partial(folder: Path, out: Path) -> Command:
    with (out.parent / "out.gguf.partial").open("r+b") as file:
        file.truncate(100)
    return folder, STOCK, Shards()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_recipe, r"another recipe \(target_bpw: 6.0, now 5.0\)"),
        (other_shards, "another shards"),
        (other_weights, r"another checkpoint \(model.safetensors \(sample"),
        (other_tokenizer, "another plan"),
        (other_version, "of another version"),
        (no_partial, "is gone"),
        (short_partial, "has 100 bytes"),
    ],
)
def test_only_the_same_conversion_goes_on(
    tmp_path: Path,
    model: SourceModel,
    change: Callable[[Path, Path], tuple[Path, Recipe, Shards]],
    words: str,
) -> None:
    out = tmp_path / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(interrupted(model, 5, KeyboardInterrupt), out, STOCK, threads=1)
    folder, recipe, shards = change(tmp_path / "model", out)
    with pytest.raises(OutputError, match=words + ".*--force"):
        convert(open_model(folder), out, recipe, shards=shards, resume=True)
    # and it is not thrown away for that
    with Journal.open(out) as journal:
        assert len(journal.done) >= 5
    convert(open_model(folder), out, recipe, shards=shards, force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf"]


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_killed_between_two_renamings(
    tmp_path: Path, model: SourceModel, monkeypatch: pytest.MonkeyPatch, renamed: int
) -> None:
    shards = Shards(count=3)
    convert(model, tmp_path / "whole.gguf", STOCK, shards=shards)
    rename, names = PartialFile.commit, []

    def some(file: PartialFile) -> None:
        names.append(file.path.name)
        if len(names) > renamed:
            raise KeyboardInterrupt
        rename(file)

    monkeypatch.setattr(PartialFile, "commit", some)
    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out.gguf", STOCK, shards=shards)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("out-*.gguf"))) == renamed
    report = convert(model, tmp_path / "out.gguf", STOCK, shards=shards, resume=True)
    for path in report.paths:
        assert path.read_bytes() == path.with_name(path.name.replace("out", "whole")).read_bytes()
    assert len(list(tmp_path.iterdir())) == 1 + 2 * len(report.paths)


def test_killed_after_the_last_renaming(
    tmp_path: Path, model: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.gguf"

    def die(journal: Journal) -> None:
        journal.close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "remove", die)
    with pytest.raises(KeyboardInterrupt):
        convert(model, out, STOCK)
    monkeypatch.undo()
    expected = out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model", "out.gguf", "out.gguf.journal"]
    command = ["convert", str(tmp_path / "model"), str(out), "--recipe", "stock", "--target-bpw", "6"]
    assert main([*command, "--embedding-type", "float", "--no-calibration", "--resume"]) == 0
    assert out.read_bytes() == expected and not journal_path(out).exists()


def test_a_recorded_plan_is_not_made_again(
    tmp_path: Path, model: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outputs"
    folder.mkdir()
    out = folder / "out.gguf"
    with pytest.raises(KeyboardInterrupt):
        convert(interrupted(model, 5, KeyboardInterrupt), out, STOCK, threads=1)
    whole = Shards()
    assert recorded_plan(out, model, STOCK, None, whole) is not None
    # in a folder that of the same conversion is found, whatever the file will be called
    assert recorded_plan(folder, model, STOCK, None, whole) is not None
    assert recorded_plan(folder, model, dataclasses.replace(STOCK, target_bpw=5.0), None, whole) is None
    assert recorded_plan(folder / "other.gguf", model, STOCK, None, whole) is None
    monkeypatch.setattr("gguf_splitquant.file_plan.weight_curves", None)
    convert(model, out, STOCK, resume=True)
    assert [p.name for p in folder.iterdir()] == ["out.gguf"]
