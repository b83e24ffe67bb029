"""What an attack is: a file that is made here, the reader that gets it, and the error that it must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attack:
    """One bad file.

    Attributes:
        name: what is wrong with it.
        make: writes it into an empty folder; returns the file or folder that the reader gets.
        error: a pattern in the message; empty where the file must be read, without harm.
    """

    name: str
    make: Callable[[Path], Path]
    error: str


def content(data: bytes, name: str = "file") -> Callable[[Path], Path]:
    """An attack that is one file with these bytes."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def one_file_each(file: str, cases: Mapping[str, tuple[bytes, str]]) -> list[Attack]:
    """Attacks that are one file of this name each, by what is wrong: its bytes, and the error."""
    return [Attack(name, content(data, file), error) for name, (data, error) in cases.items()]
