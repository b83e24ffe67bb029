"""The options of ``convert``, and the recipe that they describe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
from pathlib import Path
from typing import Any, get_args

from ..errors import RecipeError
from ..recipe import BITS, MAX_K, RECIPES, STOCK_TYPES, Granularity, Layout, OutType, Recipe
from .model_source import add_source_arguments

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", re.IGNORECASE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="Hugging Face checkpoint folder, a GGUF file, or ORG/NAME on the hub where no such path exists",
    )
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT.gguf",
        help="file to write, or a folder for a file named by its contents",
    )
    parser.add_argument(
        "--recipe",
        choices=list(RECIPES),
        default=None,
        help="split: salient input channels get more bits, for the patched llama.cpp (default); stock: "
        "ordinary tensors for any llama.cpp; paper: SplitQuantV2, k = 3, INT4; plain: its baseline",
    )
    parser.add_argument(
        "--layout", choices=get_args(Layout), help="as --recipe; float: copy the weights in --outtype"
    )
    source = parser.add_argument_group("source")
    add_source_arguments(source)
    size = parser.add_argument_group("size (split, stock)")
    size.add_argument(
        "--target-bpw", type=float, metavar="N", help="bits per weight of the linear layers (default: 4.9)"
    )
    size.add_argument("--target-size", type=_size, metavar="SIZE", help="of the whole file: 900MB, 4GiB")
    size.add_argument(
        "--type", choices=STOCK_TYPES, metavar="TYPE", help="stock: one type for all linear layers"
    )
    size.add_argument(
        "--tensor-type",
        action="append",
        default=[],
        metavar="REGEX=TYPE",
        help="a type for the weights whose name the expression finds; may be repeated",
    )
    size.add_argument(
        "--embedding-type", choices=(*STOCK_TYPES, "float"), metavar="TYPE", help="default: Q8_0"
    )
    size.add_argument("--plan", type=Path, metavar="FILE", help="write the types and clusters as JSON")
    size.add_argument(
        "--use-plan", type=Path, metavar="FILE", help="take them from there, and the recipe with its target"
    )
    statistics = parser.add_argument_group("statistics of layer inputs (split, stock)")
    statistics.add_argument(
        "--calibration-text", type=Path, metavar="FILE", help="from this UTF-8 text, not the model's own"
    )
    statistics.add_argument("--imatrix", type=Path, metavar="FILE", help="from a llama.cpp imatrix")
    statistics.add_argument(
        "--no-calibration", action="store_true", help="none: run nothing, all channels count the same"
    )
    statistics.add_argument(
        "--write-imatrix", type=Path, metavar="FILE", help="write what was found, for llama-quantize"
    )
    value = parser.add_argument_group("value split (paper, plain)")
    value.add_argument(
        "-k", type=int, metavar="K", help=f"value clusters, or most channel clusters, per layer: 1 to {MAX_K}"
    )
    value.add_argument(
        "--bits", type=int, choices=BITS, help="width of the linear quantizer; 32: split, not quantized"
    )
    value.add_argument(
        "--granularity", choices=get_args(Granularity), help="what shares one scale and zero point"
    )
    parser.add_argument(
        "--outtype",
        choices=get_args(OutType),
        help="type of what is not quantized; auto: the checkpoint's 16-bit type, F16 for F32 (default)",
    )
    parser.add_argument(
        "--no-split-head", action="store_true", help="keep an untied output head whole, in --outtype"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="tensors in work at a time (default: all cores)"
    )
    parser.add_argument(
        "--memory-limit",
        type=_size,
        metavar="SIZE",
        help="stay below this: 800MB, 4GiB. Of calibration's memory, llama.cpp's part does not follow it",
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--max-shard-size", type=_size, metavar="SIZE", help="several files, none larger: 2GB, 500MiB"
    )
    output.add_argument("--shards", type=int, metavar="N", help="so many files, of about the same size")
    output.add_argument(
        "--shard", metavar="I/N", help="only the I-th of N files (2/4: the second of four), on its own"
    )
    output.add_argument(
        "--resume", action="store_true", help="go on where an interrupted run stopped, or begin"
    )
    output.add_argument(
        "--ollama",
        metavar="NAME",
        help="only what Ollama loads (stock, unless a recipe is given), and a Modelfile beside OUT.gguf",
    )
    output.add_argument(
        "--model-card", type=Path, metavar="FILE.md", help="write a snippet for a model card: recipe, sizes"
    )
    output.add_argument(
        "--results", type=Path, metavar="FILE.json", help="what eval --output wrote, for the model card"
    )
    parser.add_argument("--force", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print every tensor's plan and the exact file size; write nothing",
    )


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The named recipe, or a plan's own, with the options that were given.

    Raises:
        RecipeError: options contradict each other, or the plan; the plan cannot be read.
    """
    _check(args)
    base = RECIPES[_recipe_name(args)]
    given = {
        name: getattr(args, name)
        for name in ("k", "bits", "granularity", "layout", "outtype")
        if getattr(args, name) is not None
    }
    if args.no_split_head:
        given["split_head"] = False
    if given.get("layout", base.layout) not in ("split", "stock"):
        return dataclasses.replace(base, **{**_NO_TARGET, **given})
    target = [args.target_bpw, args.target_size, args.type]
    if any(t is not None for t in target):
        given |= {"target_bpw": args.target_bpw, "target_size": args.target_size, "qtype": args.type or ""}
    if args.ollama:
        given["avoid"] = _refused_by_ollama([args.type, *args.tensor_type, args.embedding_type])
    if args.tensor_type:
        given["tensor_types"] = tuple(_tensor_type(t) for t in args.tensor_type)
    if args.embedding_type:
        given["embedding"] = "" if args.embedding_type == "float" else args.embedding_type
    for option, source in (("calibration_text", "text"), ("imatrix", "imatrix"), ("no_calibration", "none")):
        if getattr(args, option):
            given["calibration"] = source
    if args.use_plan:
        if args.recipe or args.ollama:
            given.setdefault("layout", base.layout)
        recipe = _planned(args, given)
    else:
        recipe = dataclasses.replace(base, **given)
    if args.write_imatrix and recipe.calibration in ("imatrix", "none"):
        raise RecipeError("--write-imatrix", "needs a calibration", "leave it out, or the other option")
    return recipe


def _planned(args: argparse.Namespace, given: dict[str, Any]) -> Recipe:
    """The recipe of the plan, with the options that do not choose types."""
    # numpy and scipy: only for those who use a plan
    from ..planning.refined import read_plan_recipe

    planned = read_plan_recipe(args.use_plan)
    for name, option in _CHOOSING.items():
        if given.get(name) and given[name] != getattr(planned, name):
            raise RecipeError(
                args.use_plan, f"was not made with this {option}", "leave it out, or make another plan"
            )
    recipe = dataclasses.replace(planned, **given)
    for option, source in (("calibration_text", "text"), ("imatrix", "imatrix")):
        if recipe.calibration == source and not getattr(args, option):
            raise RecipeError(args.use_plan, f"was made with {_flag(option)}", "give the same file")
    return recipe


_CHOOSING = {
    "target_bpw": "--target-bpw",
    "target_size": "--target-size",
    "qtype": "--type",
    "tensor_types": "--tensor-type",
    "k": "-k",
}
"""Fields of a recipe that a plan has followed, by the option that sets them."""

_NO_TARGET = {"target_bpw": None, "embedding": ""}


def _recipe_name(args: argparse.Namespace) -> str:
    if args.recipe:
        return str(args.recipe)
    if args.layout in ("split", "stock"):
        return str(args.layout)
    if args.layout is None:
        return "stock" if args.ollama else "split"
    return "paper"


def _check(args: argparse.Namespace) -> None:
    if args.threads is not None and args.threads < 1:
        raise RecipeError("--threads", f"{args.threads} is less than one", "choose 1 or more")
    base = RECIPES[_recipe_name(args)]
    layout = args.layout or base.layout
    refined_only = (
        *("type", "tensor_type", "embedding_type", "target_bpw", "target_size", "plan", "use_plan"),
        *("calibration_text", "imatrix", "no_calibration", "write_imatrix"),
    )
    value_only = ("bits", "granularity")
    wrong = value_only if layout in ("split", "stock") else refined_only
    for option in wrong:
        if getattr(args, option):
            belongs = "the value split" if option in value_only else "the split and stock layouts"
            fix = "add --recipe paper" if option in value_only else "add --recipe split or stock"
            raise RecipeError(_flag(option), f"belongs to {belongs}", f"{fix}, or leave it out")
    if args.results and not args.model_card:
        raise RecipeError("--results", "belongs to a model card", "add --model-card FILE.md")
    for option in ("ollama", "model_card"):
        if args.shard and getattr(args, option):
            raise RecipeError(_flag(option), "takes a whole model, not one shard", "leave it out")
    together = [o for o in ("calibration_text", "imatrix", "no_calibration") if getattr(args, o)]
    if len(together) > 1:
        raise RecipeError(_flag(together[1]), f"contradicts {_flag(together[0])}", "give one of them")
    for option in ("calibration_text", "imatrix", "use_plan", "results"):
        path = getattr(args, option)
        if path and not path.is_file():
            raise RecipeError(_flag(option), f"no such file: {path}", "give the path of a file")


def _refused_by_ollama(wanted: list[str | None]) -> tuple[str, ...]:
    # gguf and numpy: only for those who ask for Ollama
    from ..publishing.ollama import REFUSED

    for text in wanted:
        name = (text or "").rpartition("=")[2].upper()
        if name in REFUSED:
            loads = ", ".join(t for t in STOCK_TYPES if t not in REFUSED)
            raise RecipeError("--ollama", f"Ollama does not load {name}", f"choose one of {loads}")
    return REFUSED


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _tensor_type(text: str) -> tuple[str, str]:
    pattern, found, qtype = text.rpartition("=")
    if not found or not pattern:
        raise RecipeError("--tensor-type", f"{text!r}", "write REGEX=TYPE, such as attn_v=Q8_0")
    return pattern, qtype.upper()


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2].lower()] if match else math.inf
    if not math.isfinite(size):
        raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a size: write 900MB or 4GiB")
    return int(size)
