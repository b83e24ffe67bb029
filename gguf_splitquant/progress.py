"""How the library reports progress without printing.

Long work takes a :class:`Progress`; the command line passes one that draws a bar, tests and library users
pass none and get :data:`SILENT`.
"""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives the progress of one piece of long work at a time; called from one thread at a time."""

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin: ``what`` is a short label, ``total`` the amount of work, ``unit`` "B" or a noun."""

    def advance(self, amount: int, note: str = "") -> None:
        """``amount`` more is done; ``note`` says on what (a tensor name)."""

    def finish(self) -> None:
        """The work begun last is complete."""


class _Silent:
    def start(self, what: str, total: int, unit: str) -> None: ...

    def advance(self, amount: int, note: str = "") -> None: ...

    def finish(self) -> None: ...


SILENT: Progress = _Silent()
