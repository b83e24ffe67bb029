"""``gguf-splitquant convert MODEL OUT.gguf``."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ..recipe import BITS, MAX_K, RECIPES, STOCK_TYPES, Granularity, Layout, OutType, Recipe

if TYPE_CHECKING:
    from ..calibration.moments import Moments
    from ..convert import ConversionReport
    from ..planning import Plan
    from ..progress import Progress
    from ..sources.model import SourceModel


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="Hugging Face checkpoint directory")
    parser.add_argument("out", type=Path, metavar="OUT.gguf", help="file to write")
    parser.add_argument(
        "--recipe",
        choices=sorted(RECIPES),
        default="paper",
        help="paper: SplitQuantV2, k = 3, INT4, a scale per sub-layer (default); plain: its baseline, k = 1; "
        "stock: one ordinary ggml type, refined on the model's own text, for any llama.cpp",
    )
    parser.add_argument("-k", type=int, metavar="K", help=f"value clusters per linear layer, 1 to {MAX_K}")
    parser.add_argument(
        "--bits", type=int, choices=BITS, help="width of the linear quantizer; 32: split, not quantized"
    )
    parser.add_argument(
        "--granularity", choices=get_args(Granularity), help="what shares one scale and zero point"
    )
    parser.add_argument(
        "--layout", choices=get_args(Layout), help="float: copy the weights in --outtype, no split"
    )
    parser.add_argument(
        "--type",
        choices=STOCK_TYPES,
        metavar="TYPE",
        help=f"ggml type of the stock layout's linear layers (default: IQ4_NL): {', '.join(STOCK_TYPES)}",
    )
    parser.add_argument(
        "--calibration-text",
        type=Path,
        metavar="FILE",
        help="stock layout: take the statistics from this UTF-8 text, not from the model's own",
    )
    parser.add_argument(
        "--no-calibration",
        action="store_true",
        help="stock layout: run nothing; all input channels count the same, no error feedback",
    )
    parser.add_argument(
        "--outtype",
        choices=get_args(OutType),
        help="type of what is not split; auto: the checkpoint's 16-bit type, F16 for F32 (default)",
    )
    parser.add_argument(
        "--no-split-head", action="store_true", help="keep an untied output head whole, in --outtype"
    )
    parser.add_argument(
        "--pre", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it is not recognized"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="tensors in work at a time (default: all cores)"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor's plan and the exact file size; write nothing",
    )


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The named recipe with the options that were given."""
    given = {
        name: getattr(args, name)
        for name in ("k", "bits", "granularity", "layout", "outtype")
        if getattr(args, name) is not None
    }
    if args.no_split_head:
        given["split_head"] = False
    if args.type is not None:
        given["qtype"] = args.type
    if args.no_calibration:
        given["calibration"] = "none"
    return dataclasses.replace(RECIPES[args.recipe], **given)


def run(args: argparse.Namespace) -> int:
    """Convert, or print the plan."""
    from ..convert import convert, plan_file
    from ..errors import RecipeError
    from ..gguf_io.writer import check_target
    from ..sources import open_model
    from .progress_bar import ProgressBar

    recipe = recipe_from(args)
    if args.threads is not None and args.threads < 1:
        raise RecipeError("--threads", f"{args.threads} is less than one", "choose 1 or more")
    if recipe.layout != "stock" and (args.type or args.calibration_text or args.no_calibration):
        option = next(o for o in ("type", "calibration_text", "no_calibration") if getattr(args, o))
        raise RecipeError(
            f"--{option.replace('_', '-')}",
            "belongs to the stock layout",
            "add --recipe stock, or leave it out",
        )
    if args.calibration_text and not args.calibration_text.is_file():
        raise RecipeError("--calibration-text", f"no such file: {args.calibration_text}", "give a UTF-8 text")
    started = time.monotonic()
    if not args.dry_run:
        # before the tokenizer takes its seconds
        check_target(args.out, 0, force=args.force)
    model = open_model(args.model, pre_tokenizer=args.pre)
    if args.dry_run:
        plan, layout = plan_file(model, recipe)
        _print_plan(plan, layout.total_bytes)
        return 0
    moments = None
    if recipe.layout == "stock" and recipe.calibration == "self":
        moments = _calibrate(model, args, ProgressBar())
    report = convert(
        model,
        args.out,
        recipe,
        moments=moments,
        force=args.force,
        threads=args.threads,
        progress=ProgressBar(),
    )
    seconds = time.monotonic() - started
    _print_summary(report, seconds)
    return 0


def _calibrate(model: SourceModel, args: argparse.Namespace, progress: Progress) -> Moments:
    from ..calibration.calibrate import Calibration
    from ..calibration.checkpoint import calibrate_model

    how = Calibration(text=args.calibration_text)
    return calibrate_model(model, args.out.parent, how, threads=args.threads, progress=progress)


def _print_plan(plan: Plan, total_bytes: int) -> None:
    width = max(len(o.name) for o in plan.outputs)
    for tensor in plan.tensors:
        for output in tensor.outputs:
            shape = " x ".join(str(n) for n in output.shape)
            note = f"  ({tensor.note})" if tensor.note else ""
            print(f"{output.name:<{width}}  {output.qtype.name:<5}  {output.nbytes:>14,}  {shape}{note}")
    print(_sizes(plan, total_bytes))


def _print_summary(report: ConversionReport, seconds: float) -> None:
    print(f"{report.path}: {_sizes(report.plan, report.total_bytes)}, in {seconds:.1f} s")
    kept = [t for t in report.plan.tensors if t.note]
    if kept:
        print(f"  {len(kept)} tensors kept float: {kept[0].source.name}: {kept[0].note}", file=sys.stderr)
    if any(len(t.outputs) > 1 for t in report.plan.tensors):
        print(
            "  needs the patched llama.cpp: gguf-splitquant build-runtime, then gguf-splitquant compare "
            f"FLOAT.gguf {report.path}"
        )


def _sizes(plan: Plan, total_bytes: int) -> str:
    from ..planning import Role

    sub_layers = len(plan.outputs) - len(plan.tensors)
    return (
        f"{total_bytes:,} bytes, {len(plan.tensors)} tensors and {sub_layers} extra sub-layers, "
        f"{plan.bpw(Role.LINEAR):.2f} bpw in linear layers, {plan.bpw():.2f} over all"
    )
