"""Files of the cache that are whole or not there, whenever the process is killed.

Not :mod:`..replacing`: names are not random, so what a kill leaves is replaced by the run that goes on, and
OSError stays what it is, for the caller who knows that it is the cache that is full.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A file to write, which gets the name ``path`` when the context ends without an error."""
    partial = path.with_suffix(f".partial{path.suffix}")  # numpy would add the ending
    yield partial
    partial.replace(path)
