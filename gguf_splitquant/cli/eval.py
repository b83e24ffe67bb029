"""``gguf-splitquant eval WHAT MODEL...``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .compare import add_engine_arguments, check_positive, flash_attention

if TYPE_CHECKING:
    from ..evaluation.base import Column, EvaluationResult, Figure
    from ..evaluation.catalogue import EvaluationOptions
    from ..evaluation.results import Results

_WHAT = ("arc", "kld", "ppl", "speed", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("what", choices=_WHAT, metavar="WHAT", help=", ".join(_WHAT))
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL.gguf", help="the first is the baseline"
    )
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text for kld, ppl (default: built-in)"
    )
    parser.add_argument("--limit-tokens", type=int, metavar="N", help="read only N tokens of the text")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="arc: questions of your own, .jsonl or .parquet"
    )
    parser.add_argument("--shots", type=int, default=0, metavar="N", help="examples before an ARC question")
    parser.add_argument("--limit-questions", type=int, metavar="N", help="only N questions of each ARC set")
    parser.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="of speed, interleaved (default: 5)"
    )
    add_engine_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run finished")
    parser.add_argument(
        "--journals",
        type=Path,
        metavar="DIR",
        help="where finished items are kept (default: the user cache)",
    )
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the results")
    parser.add_argument("--report", type=Path, metavar="FILE.html", help="write a page with plots")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Evaluate, print, write."""
    from ..cache import cache_dir
    from ..evaluation.base import run_evaluation
    from ..evaluation.catalogue import CATALOGUE
    from ..evaluation.results import collect
    from ..replacing import write_text
    from .progress_bar import ProgressBar

    check_positive(args, "ctx", "threads", "limit_tokens", "limit_questions", "rounds")
    evaluations = CATALOGUE[args.what](_options(args))
    folder = args.journals or cache_dir() / "journals"
    finished = [
        run_evaluation(evaluation, args.models, folder, resume=args.resume, progress=ProgressBar())
        for evaluation in evaluations
    ]
    results = collect(args.models, finished)
    if args.output:
        results.write(args.output)
    if args.report:
        from ..evaluation.report import render_report

        write_text(args.report, render_report(results))
    print(json.dumps(results.to_json(), indent=1) if args.json else render(results))
    return 0


def _options(args: argparse.Namespace) -> EvaluationOptions:
    from ..evaluation.catalogue import EvaluationOptions
    from ..evaluation.speed import SpeedOptions
    from ..evaluation.text import read_text
    from ..evaluation.text_evaluation import TextOptions
    from ..runtime.engine import EngineOptions

    engine = EngineOptions(n_threads=args.threads, kv=args.kv, flash_attention=flash_attention(args))
    return EvaluationOptions(
        text=TextOptions(read_text(args.text), args.ctx, args.limit_tokens, engine),
        speed=SpeedOptions(rounds=args.rounds, engine=engine),
        engine=engine,
        shots=args.shots,
        limit_questions=args.limit_questions,
        questions=args.data,
    )


def render(results: Results) -> str:
    """One table per evaluation."""
    sizes = {m.file: (f"{m.file_bytes / 1e6:,.1f}", f"{m.file_bpw:.2f}") for m in results.models}
    return "\n\n".join(_table(result, sizes) for result in results.evaluations)


def _table(result: EvaluationResult, sizes: dict[str, tuple[str, str]]) -> str:
    rows = [["model", "MB", "bpw", *(column.title for column in result.columns)]]
    for model in result.models:
        cells = [_cell(model.figures.get(column.key), column) for column in result.columns]
        rows.append([model.model.name, *sizes[str(model.model)], *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    notes = [f"{model.model.name}: {note}" for model in result.models for note in model.notes]
    return "\n".join([f"{result.name}, version {result.version}", *lines, *notes])


def _cell(figure: Figure | None, column: Column) -> str:
    return "-" if figure is None else figure.text(column.form)
