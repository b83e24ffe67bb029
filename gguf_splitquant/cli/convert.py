"""``gguf-splitquant convert MODEL OUT.gguf``."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError, RecipeError
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
    write_plan,
)
from .model_source import ModelPath, find_model, open_found

if TYPE_CHECKING:
    from ..gguf_io.sharding import Shards
    from ..planning.curves import InputStatistics
    from ..progress import Progress
    from ..recipe import Recipe
    from ..sources.model import SourceModel

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    recipe = recipe_from(args)
    shards = shards_from(args)
    # before downloads, and before the tokenizer takes its seconds
    check_outputs(args, recipe, shards)
    try:
        with ExitStack() as files:
            found = find_model(args.model, args, _folder(args), files)
            return _convert(args, recipe, shards, found)
    except BaseException as error:
        if not args.dry_run and _can_go_on(args, shards, error):
            print(f"to go on: {_resuming_command(args)}", file=sys.stderr)
        raise


def _can_go_on(args: argparse.Namespace, shards: Shards, error: BaseException) -> bool:
    """What was done is kept, and the error does not say so itself."""
    from ..gguf_io.journal import journal_path, unfinished

    if not isinstance(error, Exception):
        return True  # interrupted: before there is a journal, calibration has its own
    if isinstance(error, (OutputError, RecipeError)):
        return False
    if args.out.is_dir():
        return bool(unfinished(args.out))
    return journal_path(shards.target(args.out)).exists()


def _resuming_command(args: argparse.Namespace) -> str:
    given = [a for a in args.arguments if a != "--resume"]
    return shlex.join(["gguf-splitquant", *given, "--resume"])


def shards_from(args: argparse.Namespace) -> Shards:
    """The files that the options ask for. Raises RecipeError for those that contradict."""
    from ..gguf_io.sharding import Shards, one_of

    return Shards(args.max_shard_size, args.shards, one_of(args.shard) if args.shard else None)


def _convert(args: argparse.Namespace, recipe: Recipe, shards: Shards, found: ModelPath) -> int:
    from ..convert import check_not_source, convert
    from ..file_plan import check_memory, expected_bytes, plan_file
    from ..gguf_io.writer import check_target
    from ..planning.refined import read_plan
    from ..resuming import recorded_plan
    from .progress_bar import ProgressBar

    started = time.monotonic()
    model = open_found(found, args)
    # before a calibration that takes minutes
    check_memory(model, recipe, args.memory_limit)
    progress = ProgressBar()
    if not args.dry_run:
        check_not_source(model, args.out)
    if not args.dry_run and shards.only is None and not (args.resume and _begun(args)):
        # a disk that is too small is found before hours of calibration
        out = args.out / "model.gguf" if args.out.is_dir() else args.out
        check_target(out, expected_bytes(model, recipe), force=True)
    statistics = _statistics(model, recipe, args, progress) if recipe.refined else None
    refined = read_plan(args.use_plan, model, recipe, statistics) if args.use_plan else None
    if args.resume and not args.dry_run and refined is None:
        refined = recorded_plan(args.out, model, recipe, statistics, shards)
    plan, layout, refined = plan_file(
        model, recipe, statistics=statistics, refined=refined, shards=shards, progress=progress
    )
    if args.ollama:
        check_for_ollama(plan, layout)
    if args.plan and refined:
        write_plan(args, recipe, refined)
    if args.dry_run:
        print_plan(plan, layout)
        return 0
    out = out_path(args, model, plan, Path(args.model))
    if args.ollama:
        check_target(modelfile_path(out), 0, force=args.force or args.resume)
    report = convert(
        model,
        out,
        recipe,
        statistics=statistics,
        refined=refined,
        shards=shards,
        force=args.force,
        resume=args.resume,
        threads=args.threads,
        memory_limit=args.memory_limit,
        progress=progress,
    )
    print_summary(report, shards, time.monotonic() - started, args.model)
    if args.ollama:
        write_modelfile(args, model, report.path)
    if args.model_card:
        write_model_card(args, report.path, resume=args.resume)
    return 0


def _begun(args: argparse.Namespace) -> bool:
    """Something of the output may be there: it was calibrated for, and has a part of its room."""
    # shards have a number behind the name, journals an ending, and long names are abridged
    stem = "" if args.out.is_dir() else args.out.name.removesuffix(".gguf")[:50]
    return any(path.name.startswith(stem) and ".gguf" in path.name for path in _folder(args).glob("*"))


def _folder(args: argparse.Namespace) -> Path:
    """Where OUT.gguf will be: the place for large temporary files too."""
    out: Path = args.out
    return out if out.is_dir() else out.parent


def _statistics(
    model: SourceModel, recipe: Recipe, args: argparse.Namespace, progress: Progress
) -> InputStatistics | None:
    """What the recipe's source of calibration says; cached where it took a run of the model."""
    from ..calibration.calibrate import MEMORY, Calibration
    from ..calibration.checkpoint import calibrate_model
    from ..calibration.imatrix import imatrix_for, write_moments

    if recipe.calibration == "none":
        return None
    if recipe.calibration == "imatrix":
        return imatrix_for(model, args.imatrix)
    how = Calibration(text=args.calibration_text)
    moments = calibrate_model(
        model,
        how,
        threads=args.threads,
        memory=MEMORY if args.memory_limit is None else args.memory_limit // 4,
        progress=progress,
    )
    if args.write_imatrix:
        write_moments(args.write_imatrix, moments)
    return moments
