"""``gguf-splitquant convert MODEL OUT.gguf``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .convert_options import add_arguments, recipe_from

if TYPE_CHECKING:
    from ..convert import ConversionReport
    from ..planning import Plan
    from ..planning.curves import InputStatistics
    from ..progress import Progress
    from ..recipe import Recipe
    from ..sources.model import SourceModel

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    from ..gguf_io.writer import check_target
    from ..sources.official import official_float_file

    recipe = recipe_from(args)
    if not args.dry_run:
        # before the tokenizer takes its seconds
        check_target(args.out, 0, force=args.force)
    with ExitStack() as files:
        source = args.model
        if args.official_converter:
            source = files.enter_context(
                official_float_file(args.official_converter, args.model, args.out.parent)
            )
        return _convert(args, recipe, source)


def _convert(args: argparse.Namespace, recipe: Recipe, source: Path) -> int:
    from ..convert import convert, plan_file
    from ..planning.refined import read_plan
    from ..sources import open_model
    from .progress_bar import ProgressBar

    started = time.monotonic()
    model = open_model(source, pre_tokenizer=args.pre, allow_requantize=args.allow_requantize)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    progress = ProgressBar()
    statistics = _statistics(model, recipe, args, progress) if recipe.refined else None
    refined = read_plan(args.use_plan, model, recipe, statistics) if args.use_plan else None
    plan, layout, refined = plan_file(
        model, recipe, statistics=statistics, refined=refined, progress=progress
    )
    if args.plan and refined:
        refined.write(args.plan, recipe)
    if args.dry_run:
        _print_plan(plan, layout.total_bytes)
        return 0
    report = convert(
        model,
        args.out,
        recipe,
        statistics=statistics,
        refined=refined,
        force=args.force,
        threads=args.threads,
        progress=progress,
    )
    _print_summary(report, time.monotonic() - started, args.model)
    return 0


def _statistics(
    model: SourceModel, recipe: Recipe, args: argparse.Namespace, progress: Progress
) -> InputStatistics | None:
    """What the recipe's source of calibration says; cached where it took a run of the model."""
    from ..calibration.calibrate import Calibration
    from ..calibration.checkpoint import calibrate_model
    from ..calibration.imatrix import ImportanceMatrix, read_imatrix, write_moments

    if recipe.calibration == "none":
        return None
    if recipe.calibration == "imatrix":
        return ImportanceMatrix(read_imatrix(args.imatrix))
    how = Calibration(text=args.calibration_text)
    moments = calibrate_model(model, args.out.parent, how, threads=args.threads, progress=progress)
    if args.write_imatrix:
        write_moments(args.write_imatrix, moments)
    return moments


def _print_plan(plan: Plan, total_bytes: int) -> None:
    width = max(len(o.name) for o in plan.outputs)
    for tensor in plan.tensors:
        for output in tensor.outputs:
            shape = " x ".join(str(n) for n in output.shape)
            note = f"  ({tensor.note})" if tensor.note else ""
            print(f"{output.name:<{width}}  {output.qtype.name:<5}  {output.nbytes:>14,}  {shape}{note}")
    print(_sizes(plan, total_bytes))


def _print_summary(report: ConversionReport, seconds: float, model: Path) -> None:
    print(f"{report.path}: {_sizes(report.plan, report.total_bytes)}, in {seconds:.1f} s")
    if report.refined and report.refined.predicted_kld is not None:
        print(
            f"  predicted divergence from the float model: {report.refined.predicted_kld:.3f} nats per token"
        )
    kept = [t for t in report.plan.tensors if t.note]
    if kept:
        print(f"  {len(kept)} tensors not as asked: {kept[0].source.name}: {kept[0].note}", file=sys.stderr)
    if any(len(t.outputs) > 1 for t in report.plan.tensors):
        stock = report.path.with_name(f"{report.path.stem}-stock.gguf")
        command = ["python", "convert_splitquant.py", str(model), str(stock), "--recipe", "stock"]
        print("  needs the patched llama.cpp: gguf-splitquant build-runtime")
        print(f"  for any llama.cpp or Ollama: {shlex.join(command)}")
    elif report.plan.recipe.refined:
        print("  runs in any llama.cpp")


def _sizes(plan: Plan, total_bytes: int) -> str:
    from ..planning import Role

    sub_layers = sum(len(t.sub_layers) - 1 for t in plan.tensors)
    return (
        f"{total_bytes:,} bytes, {len(plan.tensors)} tensors and {sub_layers} extra sub-layers, "
        f"{plan.bpw(Role.LINEAR):.2f} bpw in linear layers, {plan.bpw():.2f} over all"
    )
