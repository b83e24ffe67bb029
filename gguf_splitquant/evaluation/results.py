"""Results of a run as one JSON document: what was measured, on which files, by which metrics."""

from __future__ import annotations

import datetime
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..gguf_io.metadata import KEY_LAYOUT, KEY_RECIPE, errors_in
from ..replacing import write_text
from ..runtime.threads import default_threads
from .base import METRICS_VERSION, EvaluationResult
from .contents import Contents, read_contents


@dataclass(frozen=True)
class ModelFacts:
    """What a report says about a file, without running it.

    Attributes:
        file: its path.
        file_bytes, file_bpw, linear_bpw: its size (:mod:`.contents`).
        types: number of tensors by ggml type.
        layout, recipe: as recorded in files of this package, else None.
        errors: relative squared error by split weight, as recorded, else empty.
    """

    file: str
    file_bytes: int
    file_bpw: float
    linear_bpw: float | None
    types: dict[str, int]
    layout: str | None
    recipe: str | None
    errors: dict[str, float]

    @classmethod
    def of(cls, contents: Contents) -> ModelFacts:
        """The facts of a file."""
        return cls(
            file=str(contents.path),
            file_bytes=contents.file_bytes,
            file_bpw=contents.file_bpw,
            linear_bpw=contents.linear_bpw,
            types=dict(contents.types),
            layout=contents.text(KEY_LAYOUT),
            recipe=contents.text(KEY_RECIPE),
            errors=recorded_errors(contents),
        )


@dataclass(frozen=True)
class Results:
    """All evaluations of one run on the same files; the first file is the baseline."""

    models: Sequence[ModelFacts]
    evaluations: Sequence[EvaluationResult]

    def to_json(self) -> dict[str, Any]:
        """The document."""
        return {
            "format": "gguf-splitquant evaluation",
            "metrics_version": METRICS_VERSION,
            "made_by": f"gguf-splitquant {__version__}",
            "made_at": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": {"system": platform.platform(), "threads": default_threads()},
            "models": [vars(model) for model in self.models],
            "evaluations": {result.name: result.to_json() for result in self.evaluations},
        }

    def write(self, path: Path) -> None:
        """Write the document. Raises OutputError if that is not possible."""
        write_text(path, json.dumps(self.to_json(), indent=1) + "\n")


def collect(models: Sequence[Path], evaluations: Sequence[EvaluationResult]) -> Results:
    """Put a run together. Raises GGUFError for a damaged file."""
    return Results([ModelFacts.of(read_contents(model)) for model in models], evaluations)


def recorded_errors(contents: Contents) -> dict[str, float]:
    """Relative squared error of every split weight, sum((w - decoded)^2) / sum(w^2), as recorded.

    Of a model in several files each records those of its own weights.
    """
    found: dict[str, float] = {}
    for metadata in (contents.metadata, *contents.header.further_metadata):
        found |= errors_in(metadata)
    return found
