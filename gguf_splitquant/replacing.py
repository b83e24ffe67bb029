"""Small files that appear complete or not at all, and never through a link.

The content goes to a new file of a random name beside the target, which then takes the target's name: a link
of that name is replaced, and the file that it leads to stays as it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


@contextmanager
def replacing(path: Path, fix: str = "choose another place") -> Iterator[Path]:
    """A new, empty file to fill in; it gets the name ``path`` when the context ends without an error.

    ``fix`` is what an error advises. Processes that write the same file do not disturb each other.

    Raises:
        OutputError: the file cannot be written.
    """
    # of any length, so not the target's name with an ending
    partial = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        # what is there by that name, a link too, is not ours
        partial.open("xb").close()
        try:
            yield partial
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        cause = f"cannot be written: {error.strerror or error}"
        raise OutputError(path, cause, fix) from error


def write_text(path: Path, text: str, fix: str = "choose another place") -> None:
    """Write a document whole or not at all. Raises OutputError, which advises ``fix``."""
    with replacing(path, fix) as partial:
        partial.write_text(text, encoding="utf-8")
