"""Finished items of an evaluation, on disk as they come, so that an interruption loses one item at most.

A journal is a file of JSON lines: a head that says what was measured on what, then one line per item. It is
named by a digest of its head, so other settings, another version or a changed model never meet old records.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from ..errors import EvaluationError, OutputError
from ..gguf_io.header import SHARD_NAME

if TYPE_CHECKING:
    from .base import Evaluation, Record


class Journal:
    """The records of one model in one evaluation, by key. See :meth:`open`."""

    def __init__(self, path: Path, head: dict[str, Any], records: dict[str, Record], file: IO[str]) -> None:
        self.path = path
        self.head = head
        self.records = records
        self._file = file

    @classmethod
    def open(
        cls,
        folder: Path,
        evaluation: Evaluation,
        model: Path,
        *,
        resume: bool,
        baseline: Path | None = None,
    ) -> Journal:
        """The journal of ``evaluation`` on ``model`` in ``folder``; empty unless ``resume``.

        Where records are about a pair of files, ``baseline`` is the other one.

        Raises:
            OutputError: the folder cannot be written to.
            EvaluationError: the journal to resume is damaged (other than by an interruption).
        """
        head = {
            "evaluation": evaluation.name,
            "version": evaluation.version,
            "settings": evaluation.settings(),
            "model": model_identity(model),
        }
        if baseline is not None:
            head["baseline"] = model_identity(baseline)
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode()).hexdigest()[:12]
        path = folder / f"{evaluation.name}-{model.stem}-{digest}.jsonl"
        records = _read(path, head) if resume and path.exists() else {}
        with _writing(path):
            folder.mkdir(parents=True, exist_ok=True)
            # rewritten rather than appended to: an interruption may have left half a line at the end
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(path, flags, 0o666), "w", encoding="utf-8")
        journal = cls(path, head, {}, file)
        journal._write(head)
        for key, record in records.items():
            journal.add(key, record)
        return journal

    def add(self, key: str, record: Record) -> None:
        """Keep one finished item, on disk before this returns."""
        self.records[key] = record
        self._write({"key": key, "record": record})

    def _write(self, line: dict[str, Any]) -> None:
        with _writing(self.path):
            self._file.write(json.dumps(line, separators=(",", ":")) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file; the records stay."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = f"cannot write: {error.strerror}"
        raise OutputError(path, cause, "make room or choose another folder") from error


def model_identity(model: Path) -> dict[str, Any]:
    """What tells a model from another one without reading gigabytes: place, size, time of the last change."""
    shards = f"{glob.escape(SHARD_NAME.sub('', model.name))}-*-of-*.gguf"
    files = [f.stat() for f in (model.parent.glob(shards) if SHARD_NAME.search(model.name) else [model])]
    changed = max(status.st_mtime_ns for status in files)
    return {"file": str(model.resolve()), "bytes": sum(s.st_size for s in files), "changed_ns": changed}


def _read(path: Path, head: dict[str, Any]) -> dict[str, Record]:
    lines = path.read_text(encoding="utf-8").split("\n")
    # every complete line ends in a newline, so the last element is empty or the half of a line
    complete = lines[:-1]
    records: dict[str, Record] = {}
    try:
        if complete and json.loads(complete[0]) != head:
            raise ValueError("another head")
        for line in complete[1:]:
            entry = json.loads(line)
            records[entry["key"]] = entry["record"]
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            path, f"not a journal of this evaluation ({error})", "delete it, or run without --resume"
        ) from error
    return records
