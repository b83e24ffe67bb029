"""Types by patterns of weight names: a stranger's file brings its own patterns, and no pattern may hang.

Python's ``re`` has no limit of time, so ``regex`` searches. ``re`` has to understand a pattern too: it then
means what it always meant, and what only ``regex`` has (recursion, which takes memory) is left out.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence

from .errors import RecipeError

_MOST_CHARACTERS = 500
_MOST_REPEATS = 1000
_SECONDS = 10.0
"""Of processor time, for all weights together; an ordinary pattern takes a microsecond for one."""

_REPEAT = re.compile(r"\{(\d*)(?:,(\d*))?\}")


class TypePatterns:
    """Patterns and their types, in order.

    Args:
        types: (regular expression, type).

    Raises:
        RecipeError: a pattern is no regular expression, or it is larger than a limit.
    """

    def __init__(self, types: Sequence[tuple[str, str]]) -> None:
        # most recipes have no pattern
        import regex

        self._patterns = []
        self._found: dict[str, str | None] = {}
        self._left = _SECONDS
        for pattern, qtype in types:
            _check_size(pattern)
            try:
                re.compile(pattern)
                self._patterns.append((regex.compile(pattern), qtype))
            except (re.error, regex.error, OverflowError, RecursionError) as error:
                raise RecipeError(
                    "tensor type", f"{pattern!r} is not a regular expression: {error}"
                ) from error

    def type_of(self, weight: str) -> str | None:
        """The type of the first pattern that finds a weight's name; None: none does.

        Raises:
            RecipeError: the patterns take too long.
        """
        if weight not in self._found:
            self._found[weight] = self._search(weight)
        return self._found[weight]

    def _search(self, weight: str) -> str | None:
        for pattern, qtype in self._patterns:
            start = time.thread_time()
            try:
                if pattern.search(weight, timeout=max(self._left, 0.001)):
                    return qtype
            except TimeoutError as error:
                cause = f"{pattern.pattern!r} takes longer than {_SECONDS:.0f} seconds for {weight}"
                raise RecipeError("tensor type", cause, "write it without nested repeats") from error
            self._left -= time.thread_time() - start
        return None


def _check_size(pattern: str) -> None:
    """Limits of what ``regex`` may make of a pattern: it writes repeats out, nested ones multiplied."""
    if len(pattern) > _MOST_CHARACTERS:
        raise RecipeError(
            "tensor type",
            f"{pattern[:60]!r}... has {len(pattern):,} characters, and {_MOST_CHARACTERS} is the most",
            "write several patterns",
        )
    counts = [max(int(n or 1) for n in repeat.groups("1")) for repeat in _REPEAT.finditer(pattern)]
    if math.prod(max(1, n) for n in counts) > _MOST_REPEATS:
        raise RecipeError(
            "tensor type",
            f"{pattern[:60]!r} repeats more than {_MOST_REPEATS:,} times",
            "write * or + where a number does not matter",
        )
