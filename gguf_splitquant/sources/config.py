"""JSON files of a checkpoint, read with the care that files from strangers need.

A family asks for a field by its names and type and gets that type, or an error that names file and field.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bounded import MAX_JSON_PARTS, MAX_TEXT_BYTES, MiB, parse_json, read_bytes
from ..errors import CheckpointError

# tokenizer.json holds a vocabulary and its merges: four times the largest published one
_LARGER = {"tokenizer.json": (128 * MiB, 8_000_000)}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``.

    Raises:
        CheckpointError: the file is missing, unreadable, too large, or not a JSON object.
    """
    most_bytes, most_parts = _LARGER.get(path.name, (MAX_TEXT_BYTES, MAX_JSON_PARTS))
    try:
        value = parse_json(read_bytes(path, most_bytes), most_parts)
    except FileNotFoundError as error:
        raise CheckpointError(path, "not found", "download it along with the weights") from error
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})", "check its permissions") from error
    except ValueError as error:
        raise CheckpointError(path, f"not valid JSON ({error})", "download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, "not a JSON object", "download it again")
    return value


def read_json_if_there(path: Path) -> dict[str, Any] | None:
    """As :func:`read_json`; None where there is no such file."""
    return read_json(path) if path.is_file() else None


def is_text(value: str) -> bool:
    """Whether a file can hold ``value``; half a surrogate pair, an escape in some formats, it cannot."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shown(value: Any) -> str:
    """A value from a file as an error message shows it; what it holds over and over is not written out."""
    return repr(value[:80]) if isinstance(value, str) else repr(reprlib.repr(value)[:80])


class ModelConfig:
    """The fields of a ``config.json``, typed.

    A field that is null counts as absent, as in transformers.

    Args:
        fields: the JSON object.
        path: where it comes from, for error messages.
    """

    def __init__(self, fields: Mapping[str, Any], path: Path) -> None:
        self.fields = fields
        self.path = path

    def get(self, *names: str) -> Any:
        """The first of ``names`` that has a value, whatever its type; None where none has."""
        return next((self.fields[name] for name in names if self.fields.get(name) is not None), None)

    def integer(
        self, *names: str, default: int | None = None, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int:
        """An integer in a range; without a ``default`` the field has to be there."""
        value = self.get(*names)
        if value is None:
            value = self._absent(names, default)
        if type(value) is not int or not minimum <= value <= maximum:
            upper = f"to {maximum}" if type(value) is int and value > maximum else "up"
            self._bad(names, value, f"an integer from {minimum} {upper}")
        return int(value)

    def number(self, *names: str, default: float | None = None) -> float:
        """A finite number above zero; without a ``default`` the field has to be there."""
        value = self.get(*names)
        if value is None:
            value = self._absent(names, default)
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            self._bad(names, value, "a number above zero")
        return float(value)

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false."""
        value = self.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            self._bad((name,), value, "true or false")
        return bool(value)

    def section(self, name: str) -> ModelConfig | None:
        """A nested object; its fields are named ``name.field`` in errors. None where it is absent."""
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            self._bad((name,), value, "an object")
        return ModelConfig(value, Path(f"{self.path}: {name}"))

    def _absent(self, names: tuple[str, ...], default: Any) -> Any:
        if default is None:
            raise CheckpointError(
                self.path, f"no field {names[0]!r}", "download the checkpoint's own config.json"
            )
        return default

    def _bad(self, names: tuple[str, ...], value: Any, wanted: str) -> None:
        name = next((n for n in names if self.fields.get(n) is not None), names[0])
        raise CheckpointError(
            self.path, f"{name} is {json.dumps(value)[:60]}, not {wanted}", "correct the field"
        )
