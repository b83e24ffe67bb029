"""What documents say about the code, checked."""

from __future__ import annotations

import re
from pathlib import Path

from gguf_splitquant import __version__
from gguf_splitquant.gguf_io import metadata

ROOT = Path(__file__).parent.parent


def test_the_format_document_is_of_the_version_that_is_written() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    assert text.startswith(f"# The file format, version {metadata.FORMAT_VERSION}\n")
    changes = re.findall(r"^\| (\d+) \| \S", text, re.MULTILINE)
    assert changes == [str(n) for n in range(1, metadata.FORMAT_VERSION + 1)]


def test_the_format_document_names_every_key() -> None:
    text = (ROOT / "docs" / "format.md").read_text(encoding="utf-8")
    keys = [value for name, value in vars(metadata).items() if name.startswith("KEY_")]
    assert len(keys) > 8
    assert [key for key in keys if f"`{key}`" not in text] == []


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {__version__}" in text
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'\nversion = "{__version__}"\n' in project
