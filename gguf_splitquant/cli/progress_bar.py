"""The library's progress as a bar on a terminal, and as nothing when the output is piped."""

from __future__ import annotations

import sys

from tqdm import tqdm


class ProgressBar:
    """Draws :class:`gguf_splitquant.progress.Progress` with tqdm on standard error, with time left."""

    def __init__(self) -> None:
        self._bar: tqdm[None] | None = None

    def start(self, what: str, total: int, unit: str) -> None:
        """Begin a bar."""
        self._bar = tqdm(
            desc=what,
            total=total,
            unit=unit,
            unit_scale=unit == "B",
            disable=not sys.stderr.isatty(),
            leave=False,
            dynamic_ncols=True,
        )

    def advance(self, amount: int, note: str = "") -> None:
        """Move it."""
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(amount)

    def finish(self) -> None:
        """Remove it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
