"""What determines the bytes of a file: whether an interrupted conversion can be gone on with.

The journal's head holds it. Before anything is planned, recipe, versions, statistics and the checkpoint's
files are compared; after that the layout, which has every tensor's type and place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .errors import CheckpointError, OutputError
from .gguf_io.journal import Journal, journal_path, unfinished
from .gguf_io.sharding import Shards
from .gguf_io.shards import ModelLayout
from .planning.curves import InputStatistics, diagonal_of
from .planning.plan import Plan
from .planning.refined import RefinedPlan, plan_of
from .recipe import Recipe
from .sources.model import SourceModel

_PIECES, _PIECE = 32, 4096
"""Bytes of a file that are looked at: pieces from all over it."""

_ARITHMETIC = ("gguf", "numpy", "scipy", "numba")
"""Packages whose version may change a bit."""

_FIXES = {
    "recipe": "give the options of the interrupted run",
    "shards": "give the options of the interrupted run",
    "made by": "use the versions of the interrupted run",
    "statistics": "use the statistics of the interrupted run",
    "checkpoint": "use the checkpoint of the interrupted run",
}


def files_identity(files: tuple[Path, ...]) -> list[dict[str, Any]]:
    """What tells files from others of the same name, without reading them as a whole.

    Raises:
        CheckpointError: one cannot be read.
    """
    found = []
    for path in files:
        try:
            with path.open("rb") as file:
                status = path.stat()
                digest = hashlib.sha256()
                for start in np.linspace(0, max(0, status.st_size - _PIECE), _PIECES).astype(int).tolist():
                    file.seek(start)
                    digest.update(file.read(_PIECE))
        except OSError as error:
            raise CheckpointError(path, f"cannot be read: {error.strerror}", "check the disk") from error
        found.append(
            {
                "name": path.name,
                "bytes": status.st_size,
                "changed_ns": status.st_mtime_ns,
                "sample": digest.hexdigest()[:16],
            }
        )
    return found


def settings_of(
    model: SourceModel, recipe: Recipe, statistics: InputStatistics | None, shards: Shards
) -> dict[str, Any]:
    """All that is known before planning, as JSON has it."""
    return {
        "made by": f"gguf-splitquant {__version__}" + "".join(map(_version, _ARITHMETIC)),
        "recipe": json.loads(recipe.to_json()),
        "shards": [shards.most_bytes, shards.count, list(shards.only or ())],
        "checkpoint": files_identity(model.files),
        "statistics": None if statistics is None else _fingerprint(model, statistics),
    }


def _version(package: str) -> str:
    try:
        return f", {package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _fingerprint(model: SourceModel, statistics: InputStatistics) -> str:
    """Of what was measured: sensitivities follow from all of it; without them, what each channel counts."""
    if statistics.sensitivity:
        values = dict(sorted(statistics.sensitivity.items()))
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()
    digest = hashlib.sha256()
    for tensor in model.tensors:
        if statistics.input_of(tensor.name) is not None:
            digest.update(tensor.name.encode())
            digest.update(np.ascontiguousarray(diagonal_of(statistics.matrix(tensor.name))).tobytes())
    return digest.hexdigest()


def head_of(
    settings: Mapping[str, Any],
    plan: Plan,
    layout: ModelLayout,
    refined: RefinedPlan | None,
    out: Path,
) -> dict[str, Any]:
    """The journal's head: settings, plan and layout of a conversion to ``out``."""
    digest = hashlib.sha256()
    for file in layout.files:
        digest.update(file.header)
    for tensor in plan.tensors:
        if tensor.order is not None:
            digest.update(tensor.order.channels.astype("<i8").tobytes())
    return {
        "settings": dict(settings),
        "layout": digest.hexdigest(),
        "files": [path.name for path in layout.paths(out)],
        "refined": refined.to_json(plan.recipe) if refined else None,
    }


def recorded_plan(
    out: Path, model: SourceModel, recipe: Recipe, statistics: InputStatistics | None, shards: Shards
) -> RefinedPlan | None:
    """The types and clusters that an interrupted run chose; None if there is none, or nothing to choose.

    Args:
        out: the output; a folder stands for any file in it.
        model: the source.
        recipe: how.
        statistics: of layer inputs.
        shards: into how many files, and which of them.

    Raises:
        OutputError: the interrupted run had other settings, or is running still.
        RecipeError: the journal's plan does not fit the model.
    """
    settings = settings_of(model, recipe, statistics, shards)
    for target in unfinished(out) if out.is_dir() else [shards.target(out)]:
        if not journal_path(target).exists():
            continue
        with Journal.open(target) as journal:
            if journal.head is None or (out.is_dir() and journal.head.get("settings") != settings):
                continue
            check_settings(journal, settings)
            document = journal.head["refined"]
        if document is not None:
            return plan_of(document, journal.path, model, recipe, statistics)
    return None


def check_settings(journal: Journal, settings: Mapping[str, Any]) -> None:
    """Raise OutputError if the journal's run had other settings."""
    before = (journal.head or {}).get("settings", {})
    for name, fix in _FIXES.items():
        if name in settings and before.get(name) != settings[name]:
            raise _other(journal, name, _difference(before.get(name), settings[name]), fix)


def check_layout(journal: Journal, head: Mapping[str, Any]) -> None:
    """Raise OutputError if the journal's run wrote other tensors, or to other places."""
    if journal.head is not None and journal.head.get("layout") != head["layout"]:
        fix = "use its plan, with the model's configuration and tokenizer as they were"
        raise _other(journal, "plan or other metadata", "", fix)


def _other(journal: Journal, name: str, difference: str, fix: str) -> OutputError:
    cause = "it is of another version" if name == "made by" else f"the interrupted run had another {name}"
    return OutputError(
        journal.path, cause + difference, f"{fix}, or pass --force without --resume to start again"
    )


def _difference(before: Any, now: Any) -> str:
    """The first thing in which two settings differ, in brackets."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                return f" ({key}: {str(before.get(key))[:60]}, now {str(now.get(key))[:60]})"
    if isinstance(before, list) and isinstance(now, list):
        for old, new in zip(before, now, strict=False):
            if old != new and isinstance(old, dict) and isinstance(new, dict):
                return f" ({old.get('name')}{_difference(old, new)})"
    if isinstance(before, str) and isinstance(now, str) and len(before) < 200:
        return f" ({before}, now {now})"
    return ""
