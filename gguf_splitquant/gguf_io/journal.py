"""What is complete of a file that is being written: enough to go on after any interruption.

``OUT.gguf.journal`` stands beside ``OUT.gguf.partial`` from the first tensor to the last. Its first line says
what determines the bytes, then every tensor that is complete gets a line, after its data is on disk; so what
the journal says is true whenever the process, or the machine, stops. It is locked as long as its process
lives: another one cannot write the same file meanwhile.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import OutputError
from ..locks import open_locked
from ..records import Records
from .writer import beside, write_failure

_FORMAT = 1
_AGAIN = "pass --force without --resume to start again"


def journal_path(out: Path) -> Path:
    """``out.gguf`` has ``out.gguf.journal`` beside it while it is unfinished."""
    return beside(out, "journal")


def unfinished(folder: Path) -> list[Path]:
    """The outputs in a folder that have a journal."""
    found = sorted(folder.glob("*.journal"))
    return [path.with_name(path.name.removesuffix(".journal")) for path in found]


class Journal:
    """The journal of one output, locked. A context manager: leaving it closes it, and it stays.

    Made by :meth:`open`.

    Attributes:
        path: of the journal.
        head: what determines the bytes; None: nothing has begun.
        done: relative errors of the tensors that are complete; None for those that have none.
        complete: all of the file is on disk, perhaps already under its name.
    """

    def __init__(self, path: Path, records: Records) -> None:
        self.path = path
        self._records = records
        self._mutex = threading.Lock()
        self._pending: list[tuple[str, float | None, set[int]]] = []
        self._committing = False
        self.head: dict[str, Any] | None = None
        self.done: dict[str, float | None] = {}
        self.complete = False
        try:
            self._read(records.lines)
        except (KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"not a journal of this version ({error!r})") from error

    @classmethod
    def open(cls, out: Path, *, discard: bool = False) -> Journal:
        """The journal of the output ``out``, with what an interrupted run left in it.

        Args:
            out: the file that is to be written.
            discard: nothing that is there is to be gone on with.

        Raises:
            OutputError: another process is writing ``out``, or the journal is damaged or cannot be written.
        """
        path = journal_path(out)
        try:
            file = open_locked(path)
            if file is None:
                raise OutputError(out, "another process is writing it", "wait for it, or choose another name")
            try:
                return cls._opened(path, file, discard)
            except BaseException:
                file.close()
                raise
        except OSError as error:
            raise write_failure(path, error) from error

    @classmethod
    def _opened(cls, path: Path, file: FileIO, discard: bool) -> Journal:
        try:
            journal = cls(path, Records(file))
        except ValueError as error:
            if not discard:
                raise OutputError(path, f"damaged: {error}", _AGAIN) from error
            file.truncate(0)
            journal = cls(path, Records(file))
        if discard:
            journal.done, journal.complete = {}, False
        return journal

    def _partial_files(self) -> list[Path]:
        """The unfinished files that it is about."""
        return [beside(self.path.with_name(name), "partial") for name in (self.head or {}).get("files", ())]

    def _read(self, lines: Sequence[Any]) -> None:
        if not lines:
            return
        head, *others = lines
        if head["journal"] != _FORMAT:
            raise ValueError(f"format {head['journal']!r}")
        files, settings, refined = head["files"], head["settings"], head["refined"]
        # bare names: a journal leads nowhere else
        if not all(isinstance(name, str) and name and name == Path(name).name for name in files):
            raise ValueError("names of other folders' files")
        if not isinstance(settings, dict) or not isinstance(refined, dict | None):
            raise ValueError("another kind of settings")
        self.head = {key: value for key, value in head.items() if key != "journal"}
        for line in others:
            if "complete" in line:
                self.complete = True
            else:
                error = None if line["error"] is None else float(line["error"])
                if error is not None and not math.isfinite(error):
                    raise ValueError(f"an error of {error}")
                self.done[str(line["tensor"])] = error

    @property
    def begun(self) -> bool:
        """There is something to go on with."""
        return bool(self.done) or self.complete

    def begin(self, head: Mapping[str, Any]) -> None:
        """Start anew with this head; the files of the last one are removed. Raises OutputError."""
        for partial in self._partial_files():
            partial.unlink(missing_ok=True)
        self._records.clear()
        self.head, self.done, self.complete = dict(head), {}, False
        self._append([{"journal": _FORMAT, **head}])

    def add(
        self, tensor: str, error: float | None, files: set[int], sync: Callable[[set[int]], None]
    ) -> None:
        """A tensor's data is written: bring it to disk, then say so in the journal. Thread-safe.

        Tensors that come meanwhile wait for the next round of the thread that is at it, so many small ones
        cost one round together. A call may return before its tensor's turn; :meth:`finish` comes after all.

        Args:
            tensor: its name.
            error: its relative error, if it has one.
            files: numbers of the files that it is in.
            sync: brings to disk what was written to files of those numbers.

        Raises:
            OutputError: the disk refuses.
        """
        with self._mutex:
            self._pending.append((tensor, error, files))
            if self._committing:
                return
            self._committing = True
        try:
            while self._commit_pending(sync):
                pass
        except BaseException:
            with self._mutex:
                self._committing = False
            raise

    def _commit_pending(self, sync: Callable[[set[int]], None]) -> bool:
        with self._mutex:
            batch, self._pending = self._pending, []
            if not batch:
                self._committing = False
                return False
        sync({number for _, _, files in batch for number in files})
        self._append([{"tensor": name, "error": error} for name, error, _ in batch])
        self.done.update((name, error) for name, error, _ in batch)
        return True

    def finish(self) -> None:
        """All of the file is on disk; from here on only names change. Raises OutputError."""
        self._append([{"complete": True}])
        self.complete = True

    def remove(self) -> None:
        """Delete it: the output is complete, or given up."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close it and give back the lock; it stays."""
        self._records.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        try:
            self._records.append(records)
        except OSError as error:
            raise write_failure(self.path, error, resumable=True) from error


def check_not_interrupted(out: Path) -> None:
    """Raise OutputError if ``out`` is being written, or was interrupted and could go on."""
    if not journal_path(out).exists():
        return
    with Journal.open(out) as journal:
        if journal.done:
            cause = f"an interrupted conversion has left {len(journal.done)} of its tensors here"
            raise OutputError(out, cause, "pass --resume to go on, or --force to start again")
