"""``gguf-splitquant verify OUT.gguf --source MODEL``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from .model_source import add_source_arguments, find_model, open_found

if TYPE_CHECKING:
    from ..planning.curves import InputStatistics
    from ..progress import Progress
    from ..sources.model import SourceModel
    from ..verification import StoredRecipe, Verification


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("path", type=Path, metavar="OUT.gguf", help="the file; of several shards the first")
    parser.add_argument(
        "--source",
        required=True,
        metavar="MODEL",
        help="what it was made from: checkpoint folder, GGUF file, or ORG/NAME on the hub",
    )
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--all", action="store_true", help="make every tensor again, and the plan")
    how_much.add_argument(
        "--tensors",
        "--sample",
        type=int,
        default=0,
        metavar="N",
        help="so many, at random (default: one of every kind of layer, which are always among them)",
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of the sample (default: another each time)")
    parser.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="the one that the file was made with"
    )
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="the one that the file was made with")
    add_source_arguments(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Verify; 1 if something differs."""
    from ..errors import VerificationError
    from ..verification import read_recipe

    for name, least in (("threads", 1), ("tensors", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise VerificationError(f"--{name}", f"{value} is less than {least}", f"use {least} or more")
    stored = read_recipe(args.path)
    _check_options(args, stored)
    with ExitStack() as files:
        work = Path(files.enter_context(tempfile.TemporaryDirectory(prefix="gguf-splitquant-")))
        model = open_found(find_model(args.source, args, work, files), args)
        found = _verify(model, stored, args)
    if args.json:
        print(json.dumps({**dataclasses.asdict(found), "matches": found.matches}, indent=1))
    else:
        print(render(found))
    for note in found.notes:
        print(f"note: {note}", file=sys.stderr)
    return 0 if found.matches else 1


def _verify(model: SourceModel, stored: StoredRecipe, args: argparse.Namespace) -> Verification:
    from ..verification import verify
    from .progress_bar import ProgressBar

    progress = ProgressBar()
    return verify(
        stored,
        model,
        statistics=_statistics(model, stored, args, progress),
        tensors=None if args.all else args.tensors,
        seed=args.seed,
        threads=args.threads,
        progress=progress,
    )


def render(found: Verification) -> str:
    """The result for people: what was compared, and what differs."""
    seed = "" if found.seed is None else f", --seed {found.seed}"
    made = f"{len(found.checked)} of {found.of} tensors made again"
    what = f"{made} ({found.compared_bytes:,} bytes{seed}), metadata"
    if found.matches:
        return f"match: {what}"
    lines = [f"  {difference}" for difference in found.differences]
    return "\n".join([f"differs in {len(lines)}: {what}", *lines])


def _check_options(args: argparse.Namespace, stored: StoredRecipe) -> None:
    """The statistics that the recipe names have to be given, and no others."""
    from ..errors import VerificationError

    wanted = stored.recipe.calibration if stored.needs_statistics else "none"
    for option, source in (("calibration_text", "text"), ("imatrix", "imatrix")):
        flag, given = f"--{option.replace('_', '-')}", getattr(args, option)
        if source == wanted and given is None:
            raise VerificationError(args.path, f"was made with {flag}", "give the same file")
        if source != wanted and given is not None:
            raise VerificationError(flag, f"{args.path} was made without", "leave it out")
        if given is not None and not given.is_file():
            raise VerificationError(flag, f"no such file: {given}", "give the path of a file")


def _statistics(
    model: SourceModel, stored: StoredRecipe, args: argparse.Namespace, progress: Progress
) -> InputStatistics | None:
    """What the recipe's source of calibration says; from the cache where it is known."""
    if not stored.needs_statistics:
        return None
    from ..calibration.calibrate import Calibration
    from ..calibration.checkpoint import calibrate_model
    from ..calibration.imatrix import imatrix_for

    if stored.recipe.calibration == "imatrix":
        return imatrix_for(model, args.imatrix)
    how = Calibration(text=args.calibration_text)
    return calibrate_model(model, how, threads=args.threads, progress=progress)
