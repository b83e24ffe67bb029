"""Applies the package's own patches to llama.cpp's sources, strictly and without a `patch` program.

The sources are pinned by their hash, so a hunk that does not match to the letter means that something is
wrong: there is no fuzz, and no line offset.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ..errors import BuildError

PATCHES = ("llama.cpp-sub-weights.patch", "llama.cpp-amx-bf16.patch")
"""They change different files."""

_HUNK = re.compile(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")


def patch_text() -> str:
    """All patches as one: in a checkout from ``patches/``, in an installed package from its data files.

    Raises:
        BuildError: one is in neither place.
    """
    return "".join(_read(name) for name in PATCHES)


def _read(name: str) -> str:
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "_patches", package.parent / "patches"):
        path = folder / name
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise BuildError(name, "the patch is not in this installation", "reinstall gguf-splitquant")


def apply_patch(text: str, root: Path) -> list[Path]:
    """Apply a unified diff, as ``git diff`` writes it, to the files under ``root``.

    All hunks are checked before the first file is written. Files are changed, never added, removed or
    renamed.

    Returns:
        The files that changed.

    Raises:
        BuildError: a file is missing, lies outside ``root``, or differs from what the patch expects.
    """
    changed: dict[Path, str] = {}
    for name, hunks in _files(text):
        path = root / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or not path.is_file():
            raise BuildError(name, "the patch changes this file, which these sources do not have")
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        for start, old, new in reversed(hunks):
            if lines[start : start + len(old)] != old:
                raise BuildError(
                    name,
                    f"line {start + 1} is not what the patch expects",
                    "use the llama.cpp that patches/README.md names",
                )
            lines[start : start + len(old)] = new
        changed[path] = "".join(lines)
    for path, content in changed.items():
        path.write_text(content, encoding="utf-8")
    return list(changed)


_Hunk = tuple[int, list[str], list[str]]


def _files(text: str) -> Iterator[tuple[str, list[_Hunk]]]:
    """Each file's name and its hunks: first line (from 0), the lines before, the lines after."""
    lines = iter(text.splitlines(keepends=True))
    name = ""
    hunks: list[_Hunk] = []
    for line in lines:
        if line.startswith("+++ "):
            if hunks:
                yield name, hunks
            name, hunks = line[4:].strip().removeprefix("b/"), []
        elif header := _HUNK.match(line):
            first, n_old, n_new = int(header[1]), int(header[2] or 1), int(header[4] or 1)
            old: list[str] = []
            new: list[str] = []
            while len(old) < n_old or len(new) < n_new:
                body = next(lines, "")
                if body[:1] not in (" ", "-", "+"):
                    cause = f"damaged hunk of {name} in the patch"
                    raise BuildError("llama.cpp", cause, "reinstall gguf-splitquant")
                if body[0] != "+":
                    old.append(body[1:])
                if body[0] != "-":
                    new.append(body[1:])
            hunks.append((first - 1, old, new))
    if hunks:
        yield name, hunks
