"""A snippet for a model card: what the file is, how large, and what was measured.

It begins with the fields that a hub reads (YAML, https://huggingface.co/docs/hub/model-cards), then says the
same to people.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from gguf import Keys

from ..bounded import parse_json, read_bytes
from ..errors import EvaluationError
from ..evaluation.base import Figure
from ..evaluation.contents import Contents
from ..gguf_io.metadata import KEY_LAYOUT, KEY_ORDER_WEIGHTS, KEY_RECIPE

_PROJECT = "gguf-splitquant"
_LICENCE = {
    "license": Keys.General.LICENSE,
    "license_name": Keys.General.LICENSE_NAME,
    "license_link": Keys.General.LICENSE_LINK,
}
_TITLES = {"kld": "Divergence from the float model", "ppl": "Perplexity", "arc": "ARC", "speed": "Speed"}


def model_card(contents: Contents, results: Mapping[str, Any] | None = None) -> str:
    """The card of one file, in Markdown.

    Args:
        contents: the file.
        results: what ``eval --output`` wrote; None: nothing was measured.
    """
    metadata = contents.metadata
    name = contents.text(Keys.General.NAME) or contents.path.stem
    lines = ["---", yaml.safe_dump(_fields(metadata), sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {name} GGUF", "", _sentence(contents), ""]
    lines += _table(["file", "size", "bpw", "bpw, linear layers", "types"], [_row(contents)])
    recipe = metadata.get(KEY_RECIPE)
    if isinstance(recipe, str):
        lines += ["", f"Made by {metadata.get(Keys.General.QUANTIZED_BY)} with this recipe:", ""]
        lines += ["```json", _readable(recipe), "```"]
    if results is not None:
        lines += ["", "## Measured", "", f"With {results.get('made_by', 'gguf-splitquant')}, "
                  "95 % confidence intervals; the first file is the baseline."]  # fmt: skip
        for evaluation, result in results["evaluations"].items():
            lines += ["", f"### {_TITLES.get(evaluation, evaluation)}", "", *_measured(result)]
    return "\n".join(lines) + "\n"


def read_results(path: Path) -> dict[str, Any]:
    """A file that ``eval --output`` wrote. Raises EvaluationError for any other."""
    try:
        document = parse_json(read_bytes(path))
        if document["format"] != "gguf-splitquant evaluation":
            raise ValueError(f"its format is {document['format']!r}")
        for result in document["evaluations"].values():
            _measured(result)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        cause = f"not results of an evaluation ({type(error).__name__}: {error})"
        raise EvaluationError(path, cause, "give a file that `eval --output` wrote") from error
    return dict(document)


def _fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    base = metadata.get(Keys.General.SOURCE_REPO_URL) or metadata.get(
        Keys.General.BASE_MODEL_REPO_URL.format(id=0)
    )
    if isinstance(base, str) and "huggingface.co/" in base:
        fields["base_model"] = base.rstrip("/").partition("huggingface.co/")[2]
        fields["base_model_relation"] = "quantized"
    for field, key in _LICENCE.items():
        licence = metadata.get(key)
        if isinstance(licence, str) and licence:
            fields[field] = licence
    languages = metadata.get(Keys.General.LANGUAGES)
    if isinstance(languages, list) and languages:
        fields["language"] = [str(language) for language in languages]
    fields["quantized_by"] = [*str(metadata.get(Keys.General.QUANTIZED_BY, _PROJECT)).split(), _PROJECT][0]
    fields["library_name"] = "gguf"
    fields["tags"] = ["gguf", _PROJECT]
    return fields


def _sentence(contents: Contents) -> str:
    layout = contents.text(KEY_LAYOUT)
    split = KEY_ORDER_WEIGHTS in contents.metadata or any(len(g) > 1 for g in contents.layers.values())
    if layout is None:
        return "A GGUF file for llama.cpp."
    if split:
        return (
            "The layers of this GGUF file are split into sub-layers; it runs in the patched llama.cpp that "
            "`gguf-splitquant build-runtime` makes."
        )
    return "A GGUF file of ordinary tensors; it runs in any llama.cpp."


def _row(contents: Contents) -> list[str]:
    linear = contents.linear_bpw
    return [
        contents.path.name,
        f"{contents.file_bytes / 1e6:,.1f} MB",
        f"{contents.file_bpw:.2f}",
        "-" if linear is None else f"{linear:.2f}",
        ", ".join(f"{count} {name}" for name, count in contents.types.items()),
    ]


def _readable(recipe: str) -> str:
    """Only the fields that say something."""
    try:
        fields = json.loads(recipe)
    except (ValueError, RecursionError):
        return recipe
    if not isinstance(fields, dict):
        return recipe
    of_value_split = ("k", "bits", "granularity")
    silent = {"stock": of_value_split, "split": of_value_split[1:], "value": ("calibration",)}
    dropped = silent.get(str(fields.get("layout")), ())
    said = {k: v for k, v in fields.items() if v not in (None, "", []) and k not in dropped}
    return json.dumps(said)


def _measured(result: Mapping[str, Any]) -> list[str]:
    columns = result["columns"]
    rows = []
    for model in result["models"]:
        figures = model["figures"]
        cells = [_cell(figures.get(column["key"]), column.get("form", ".4g")) for column in columns]
        rows.append([Path(model["file"]).name, *cells])
    return _table(["file", *(str(column["title"]) for column in columns)], rows)


def _cell(figure: Mapping[str, Any] | None, form: str) -> str:
    if figure is None or figure["value"] is None or not math.isfinite(figure["value"]):
        return "-"
    return Figure(figure["value"], figure.get("error"), figure.get("low"), figure.get("high")).text(form)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (head, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return [lines[0], "|" + "---|" * len(head), *lines[1:]]
