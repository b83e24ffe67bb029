"""The files of a model while they are written: any tensor at any time by any thread, then all names together.

With a journal an interruption leaves what is complete, and the next run goes on there.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from ..errors import CheckpointError
from .journal import Journal
from .shards import MetadataOf, ModelLayout
from .writer import PartialFile, check_target


class PartialModel:
    """The files of a model, written at any positions by any threads, then renamed into place together.

    Use as a context manager: leaving it without :meth:`commit` removes all; with a journal that has something
    to go on with, it stays after an interruption or a full disk.

    Args:
        out: the file; of several the name before the number.
        layout: where everything lies, and which files are written.
        force: replace existing files.
        journal: what it says is complete is gone on with; None: nothing outlives a failure.

    Raises:
        OutputError: a file exists (without ``force``), its folder is missing or read-only, or the disk is too
            small for all of them; what is to be gone on with is gone.
    """

    def __init__(
        self,
        out: Path,
        layout: ModelLayout,
        *,
        force: bool = False,
        journal: Journal | None = None,
    ) -> None:
        self.paths = layout.paths(out)
        self._layout = layout
        self._journal = journal
        self._place = {
            tensor.name: place
            for outputs in layout.outputs
            for tensor in outputs
            if (place := layout.place_of(tensor.name)) is not None
        }
        self._files = {
            number: PartialFile(path, layout.files[number].total_bytes, resumable=journal is not None)
            for number, path in zip(layout.written, self.paths, strict=True)
        }
        self._committed = False
        self._open: dict[int, PartialFile] = {}
        try:
            self._open_files(force)
        except BaseException:
            if journal is not None and journal.begun:
                journal.close()
            elif journal is not None:
                journal.remove()
            raise

    def _open_files(self, force: bool) -> None:
        journal = self._journal
        going_on = journal is not None and journal.begun
        # of a run that was killed between two renamings
        renamed = {n for n, f in self._files.items() if journal and journal.complete and f.in_place}
        missing = sum(f.missing_bytes for n, f in self._files.items() if n not in renamed)
        for number, file in self._files.items():
            if number not in renamed:
                check_target(file.path, missing, force=force or bool(journal and journal.complete))
        with ExitStack() as undo:
            for number, file in self._files.items():
                if number in renamed:
                    continue
                if going_on:
                    file.reopen()
                    undo.callback(file.close)
                else:
                    file.create(force=force)
                    undo.callback(file.discard)
                self._open[number] = file
            undo.pop_all()

    def __enter__(self) -> PartialModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._committed:
            return
        if self._journal is not None and self._journal.begun and not _would_fail_again(error):
            for file in self._open.values():
                file.close()
            self._journal.close()
            return
        for file in self._open.values():
            file.discard()
        if self._journal is not None:
            self._journal.remove()

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        """Write ``data`` at byte ``position`` of a tensor; one that is in none of the files is let go.

        Thread-safe. Raises OutputError when the disk refuses.
        """
        place = self._place.get(tensor)
        if place is not None:
            number, offset = place
            self._files[number].write_at(offset + position, data)

    def complete(self, weight: str, tensors: Sequence[str], error: float | None) -> None:
        """All ``tensors`` of a weight are written. Thread-safe. Raises OutputError when the disk refuses.

        Args:
            weight: its name.
            tensors: what it became.
            error: its relative error, if it has one.
        """
        if self._journal is not None:
            places = [self._place[t] for t in tensors if t in self._place]
            self._journal.add(weight, error, {number for number, _ in places}, self._sync)

    def _sync(self, numbers: set[int]) -> None:
        for number in sorted(numbers):
            self._files[number].sync()

    def commit(self, architecture: str, metadata_of: MetadataOf) -> None:
        """Everything is written: the headers with the final metadata, then the names, the first one last."""
        headers = self._layout.headers(architecture, metadata_of)
        for number, file in self._open.items():
            file.write_at(0, headers[number])
            file.sync()
        if self._journal is not None and not self._journal.complete:
            self._journal.finish()
        for number in reversed(list(self._open)):
            self._open[number].commit()
        self._committed = True
        if self._journal is not None:
            self._journal.remove()


def _would_fail_again(error: BaseException | None) -> bool:
    """What is wrong with a checkpoint stays wrong, unless it was the system that could not read it."""
    return isinstance(error, CheckpointError) and not isinstance(error.__cause__, OSError)
