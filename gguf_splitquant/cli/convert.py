"""``gguf-splitquant convert MODEL OUT.gguf``."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .convert_options import add_arguments, recipe_from
from .convert_output import (
    check_for_ollama,
    check_outputs,
    modelfile_path,
    out_path,
    print_plan,
    print_summary,
    write_model_card,
    write_modelfile,
)

if TYPE_CHECKING:
    from ..planning.curves import InputStatistics
    from ..progress import Progress
    from ..recipe import Recipe
    from ..sources.model import SourceModel

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    recipe = recipe_from(args)
    # before downloads, and before the tokenizer takes its seconds
    check_outputs(args)
    with ExitStack() as files:
        return _convert(args, recipe, *_source(args, files))


def _source(args: argparse.Namespace, files: ExitStack) -> tuple[Path, str]:
    """The path to read, until ``files`` is closed; and the repository that it came from, or nothing."""
    from ..errors import RecipeError
    from ..sources.families import FAMILIES
    from ..sources.hub import hub_checkpoint, is_repository
    from ..sources.official import official_float_file

    path, repository = Path(args.model), ""
    if is_repository(args.model):
        repository = args.model
        families = None if args.official_converter else FAMILIES
        path = files.enter_context(
            hub_checkpoint(repository, args.revision, families=families, show=sys.stderr.isatty())
        )
    elif args.revision:
        raise RecipeError("--revision", f"{path} is a path, not a repository", "leave it out")
    if args.official_converter:
        folder = _folder(args)
        path = files.enter_context(official_float_file(args.official_converter, path, folder))
    return path, repository


def _convert(args: argparse.Namespace, recipe: Recipe, source: Path, repository: str) -> int:
    from ..convert import check_memory, convert, plan_file
    from ..gguf_io.writer import check_target
    from ..planning.refined import read_plan
    from ..sources import open_model
    from ..sources.hub import with_source
    from .progress_bar import ProgressBar

    started = time.monotonic()
    model = open_model(source, pre_tokenizer=args.pre, allow_requantize=args.allow_requantize)
    for note in model.notes:
        print(f"warning: {note}", file=sys.stderr)
    if repository:
        model = with_source(model, repository)
    # before a calibration that takes minutes
    check_memory(model, recipe, args.memory_limit)
    progress = ProgressBar()
    statistics = _statistics(model, recipe, args, progress) if recipe.refined else None
    refined = read_plan(args.use_plan, model, recipe, statistics) if args.use_plan else None
    shard = args.max_shard_size
    plan, layout, refined = plan_file(
        model, recipe, statistics=statistics, refined=refined, max_shard_bytes=shard, progress=progress
    )
    if args.ollama:
        check_for_ollama(plan, layout)
    if args.plan and refined:
        refined.write(args.plan, recipe)
    if args.dry_run:
        print_plan(plan, layout)
        return 0
    out = out_path(args, model, plan, Path(args.model))
    if args.ollama:
        check_target(modelfile_path(out), 0, force=args.force)
    report = convert(
        model,
        out,
        recipe,
        statistics=statistics,
        refined=refined,
        max_shard_bytes=shard,
        force=args.force,
        threads=args.threads,
        memory_limit=args.memory_limit,
        progress=progress,
    )
    print_summary(report, time.monotonic() - started, args.model)
    if args.ollama:
        write_modelfile(args.ollama, model, report.path, force=args.force)
    if args.model_card:
        write_model_card(args, report.path)
    return 0


def _folder(args: argparse.Namespace) -> Path:
    """Where OUT.gguf will be: the place for large temporary files too."""
    out: Path = args.out
    return out if out.is_dir() else out.parent


def _statistics(
    model: SourceModel, recipe: Recipe, args: argparse.Namespace, progress: Progress
) -> InputStatistics | None:
    """What the recipe's source of calibration says; cached where it took a run of the model."""
    from ..calibration.calibrate import Calibration
    from ..calibration.checkpoint import calibrate_model
    from ..calibration.imatrix import imatrix_for, write_moments

    if recipe.calibration == "none":
        return None
    if recipe.calibration == "imatrix":
        return imatrix_for(model, args.imatrix)
    how = Calibration(text=args.calibration_text)
    moments = calibrate_model(model, _folder(args), how, threads=args.threads, progress=progress)
    if args.write_imatrix:
        write_moments(args.write_imatrix, moments)
    return moments
