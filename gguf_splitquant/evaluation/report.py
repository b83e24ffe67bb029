"""Results as one HTML page that needs nothing else: no network, no script.

Plots are SVG written here, in colours that follow the reader's light or dark setting, and scale to a phone.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from .base import Column, EvaluationResult, Figure, ModelResult
from .heat_map import heat_map
from .plots import Bar, Point, interval_bars, scatter
from .results import ModelFacts, Results

_STYLE = "report.css"


def render_report(results: Results) -> str:
    """The page."""
    document = results.to_json()
    evaluations = {result.name: result for result in results.evaluations}
    sections = [_files(results.models)]
    if "kld" in evaluations:
        sections.append(_size_plot(results, evaluations["kld"]))
    sections += [
        _arc_plot(evaluations[name]) for name in ("arc_challenge", "arc_easy") if name in evaluations
    ]
    sections += [_table_section(result) for result in results.evaluations]
    sections += [_errors(model) for model in results.models if model.errors]
    style = resources.files(__package__).joinpath(_STYLE).read_text(encoding="utf-8")
    title = f"{Path(results.models[0].file).stem}: evaluation"
    return (
        "<!doctype html>\n"
        '<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title><style>{style}</style></head>\n<body><main>"
        f"<h1>{_text(title)}</h1>"
        f'<p class="about">{_text(document["made_by"])}, metrics version {document["metrics_version"]}, '
        f"{_text(document['made_at'])}, {_text(document['machine']['system'])}. "
        "The first file is the baseline.</p>\n" + "\n".join(sections) + "\n</main></body></html>\n"
    )


def _files(models: Sequence[ModelFacts]) -> str:
    rows = [
        [
            f"<td>{_name(model.file)}</td>",
            f'<td class="n">{model.file_bytes / 1e6:,.1f}</td>',
            f'<td class="n">{model.file_bpw:.2f}</td>',
            f'<td class="n">{"-" if model.linear_bpw is None else f"{model.linear_bpw:.2f}"}</td>',
            f'<td class="free">{_text(", ".join(f"{n} {kind}" for kind, n in model.types.items()))}</td>',
            f'<td class="free">{_text(_recipe(model))}</td>',
        ]
        for model in models
    ]
    head = ["file", "MB", "bpw", "bpw of linear layers", "tensors", "recipe"]
    return _section("Files", _html_table(head, rows))


def _recipe(model: ModelFacts) -> str:
    if model.recipe is None:
        return "-"
    try:
        fields = json.loads(model.recipe)
        return ", ".join(f"{key} {value}" for key, value in fields.items())
    except (ValueError, AttributeError, RecursionError):
        return model.recipe


def _size_plot(results: Results, kld: EvaluationResult) -> str:
    points = []
    for facts, result in list(zip(results.models, kld.models, strict=True))[1:]:
        figure = result.figures.get("kld")
        if figure is not None and figure.value is not None and figure.value > 0:
            points.append(Point(facts.file_bytes / 1e6, figure.value, Path(facts.file).stem))
    floor = kld.models[0].figures.get("kld")
    if not points:
        return ""
    note = "Lower left is better. The line joins the files that no other file beats in both."
    if floor is not None and floor.value:
        note += f" Noise floor (the baseline run with other batches): {floor.value:.2g} nats."
    plot = scatter(points, x_title="file size, MB", y_title="mean KLD, nats per token (log scale)")
    return _section("Size against divergence", f"<p>{_text(note)}</p>{plot}")


def _arc_plot(result: EvaluationResult) -> str:
    bars = []
    for model in result.models:
        figure = model.figures.get("acc_norm") or model.figures.get("acc")
        if figure is not None and figure.value is not None:
            low, high = _interval(figure)
            bars.append(Bar(model.model.stem, figure.value, low, high))
    if not bars:
        return ""
    titles = {"arc_challenge": "ARC-Challenge", "arc_easy": "ARC-Easy"}
    about = "Share of right answers, normalized by length, with 95 % confidence intervals."
    plot = interval_bars(bars, reference=bars[0].value)
    return _section(titles.get(result.name, result.name), f"<p>{about}</p>{plot}")


def _interval(figure: Figure) -> tuple[float, float]:
    value = figure.value or 0.0
    if figure.low is not None and figure.high is not None:
        return figure.low, figure.high
    error = figure.error or 0.0
    return value - error, value + error


def _table_section(result: EvaluationResult) -> str:
    best = {column.key: _best(result.models, column) for column in result.columns}
    rows = []
    for model in result.models:
        cells = [f"<td>{_name(str(model.model))}</td>"]
        for column in result.columns:
            figure = model.figures.get(column.key)
            mark = ' class="n best"' if figure is not None and figure is best[column.key] else ' class="n"'
            cells.append(f"<td{mark}>{_cell(figure, column)}</td>")
        rows.append(cells)
    head = ["file", *(column.title for column in result.columns)]
    notes = [f"{model.model.name}: {note}" for model in result.models for note in model.notes]
    explained = [(column.title, column.about.rstrip(".")) for column in result.columns if column.about]
    legend = "; ".join(f"{title}: {about}" for title, about in explained)
    settings = ", ".join(f"{key} {value}" for key, value in result.settings.items() if value is not None)
    foot = "".join(f"<p>{_text(line)}</p>" for line in [legend, *notes, settings] if line)
    return _section(
        f"{result.name}, version {result.version}",
        _html_table(head, rows) + f'<div class="notes">{foot}</div>',
    )


def _best(models: Sequence[ModelResult], column: Column) -> Figure | None:
    """The best figure of a column among the files that are not the baseline."""
    figures = [model.figures[column.key] for model in models[1:] if column.key in model.figures]
    known = [figure for figure in figures if figure.value is not None and math.isfinite(figure.value)]
    if len(known) < 2 or not column.better:
        return None
    choose = min if column.better == "lower" else max
    return choose(known, key=lambda figure: figure.value or 0.0)


def _cell(figure: Figure | None, column: Column) -> str:
    if figure is None or figure.value is None:
        return "-"
    text = _text(format(figure.value, column.form))
    if figure.low is not None and figure.high is not None:
        low, high = format(figure.low, column.form), format(figure.high, column.form)
        return f"{text} <small>{_text(low)} to {_text(high)}</small>"
    return (
        text
        if figure.error is None
        else f"{text} <small>± {_text(format(figure.error, column.form))}</small>"
    )


def _errors(model: ModelFacts) -> str:
    cells = {}
    for name, error in model.errors.items():
        found = re.fullmatch(r"blk\.(\d+)\.(.+)\.weight", name)
        if found:
            cells[(found.group(2), int(found.group(1)))] = error
    if not cells:
        return ""
    about = "Relative squared error of each split weight, sum((w - decoded)²) / sum(w²): kind by layer."
    return _section(f"Error per tensor: {Path(model.file).stem}", f"<p>{about}</p>{heat_map(cells)}")


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # a head stands where its figures stand
    kinds = [re.match(r'<td class="(n|free)', cell) for cell in (rows[0] if rows else head)]
    heads = "".join(
        f'<th scope="col" class="{kind.group(1) if kind else ""}">{_text(title)}</th>'
        for title, kind in zip(head, kinds, strict=True)
    )
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    # the wrapper scrolls sideways on a phone, the page does not
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{_text(title)}</h2>{content}</section>"


def _name(path: str) -> str:
    return f'<span title="{_text(path)}">{_text(Path(path).stem)}</span>'


def _text(value: object) -> str:
    return html.escape(str(value))
