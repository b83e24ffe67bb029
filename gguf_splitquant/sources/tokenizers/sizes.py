"""A tokenizer's files that libraries read whole, measured before they do.

SentencePiece and transformers take a file at its length; a sparse one of a terabyte costs nothing to make.
"""

from __future__ import annotations

from pathlib import Path

from ...bounded import MAX_TEXT_BYTES, MiB, read_bytes
from ...errors import TokenizerError
from ..config import read_json_if_there

MAX_MODEL_BYTES = 16 * MiB
"""Of tokenizer.model, merges, templates: three times the largest; a part costs fifty times its own bytes."""

# what transformers may open, by its endings: the names differ from class to class
_ENDINGS = (".json", ".txt", ".model", ".jinja", ".spm", ".codes", ".tokenizer")
_MEASURED_ELSEWHERE = "tokenizer.json"
_OBJECTS = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "chat_template.json",
)


def read_model(path: Path) -> bytes:
    """The content of a ``tokenizer.model``. Raises TokenizerError if it cannot be read, or is too long."""
    try:
        return read_bytes(path, MAX_MODEL_BYTES)
    except (OSError, ValueError) as error:
        raise TokenizerError(path, f"cannot be read ({error})", "download it again") from error


def check_files(folder: Path) -> None:
    """Look at every file in ``folder`` that transformers may read.

    Raises:
        TokenizerError: one is too long.
        CheckpointError: one that has to be a JSON object is none, or has too many parts.
    """
    templates = (folder / "additional_chat_templates").glob("*.jinja")
    for path in sorted([*folder.iterdir(), *templates]):
        if path.suffix not in _ENDINGS or path.name == _MEASURED_ELSEWHERE or not path.is_file():
            continue
        most = MAX_TEXT_BYTES if path.suffix == ".json" else MAX_MODEL_BYTES
        size = path.stat().st_size
        if size > most:
            raise TokenizerError(
                path, f"has {size:,} bytes, and {most:,} is the most", "download it again, or move it away"
            )
    for name in _OBJECTS:
        read_json_if_there(folder / name)
