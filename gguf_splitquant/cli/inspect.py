"""``gguf-splitquant inspect FILE.gguf``."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..evaluation.contents import Contents


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options."""
    parser.add_argument("path", type=Path, metavar="FILE.gguf")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--model-card", type=Path, metavar="FILE.md", help="write a snippet for a model card")
    parser.add_argument(
        "--results", type=Path, metavar="FILE.json", help="what eval --output wrote, for the model card"
    )
    parser.add_argument("--force", action="store_true", help="replace the model card if it exists")


def run(args: argparse.Namespace) -> int:
    """Print what is in the file."""
    from ..errors import printable
    from ..evaluation.contents import read_contents

    contents = read_contents(args.path)
    if args.model_card or args.results:
        return _write_card(args)
    found = describe(contents)
    print(json.dumps(found, indent=1) if args.json else printable(render(found)))
    return 0


def _write_card(args: argparse.Namespace) -> int:
    from ..errors import SplitQuantError
    from .convert_output import write_model_card

    if not args.model_card:
        raise SplitQuantError("--results", "belongs to a model card", "add --model-card FILE.md")
    write_model_card(args, args.path)
    return 0


def describe(contents: Contents) -> dict[str, Any]:
    """Everything that is shown, as JSON."""
    from gguf import Keys

    from ..evaluation.contents import is_order
    from ..evaluation.results import ModelFacts

    facts = ModelFacts.of(contents)
    recipe = None
    if facts.recipe is not None:
        try:
            recipe = json.loads(facts.recipe)
        except (ValueError, RecursionError):
            # whoever wrote it, it is shown as it is
            recipe = facts.recipe
    return {
        "file": facts.file,
        "architecture": contents.text(Keys.General.ARCHITECTURE),
        "name": contents.text(Keys.General.NAME),
        "quantized_by": contents.text(Keys.General.QUANTIZED_BY),
        "bytes": facts.file_bytes,
        "parameters": contents.n_params,
        "bpw": facts.file_bpw,
        "linear_bpw": facts.linear_bpw,
        "layout": facts.layout,
        "recipe": recipe,
        "types": facts.types,
        "tensors": [
            {
                "name": name,
                "shape": list(contents.shape_of(group)),
                "types": [tensor.qtype.name for tensor in group],
                "channels": [tensor.shape[-1] for tensor in group] if len(group) > 1 else [],
                "bytes": sum(tensor.nbytes for tensor in group),
                "bpw": 8 * sum(t.nbytes for t in group) / max(1, math.prod(contents.shape_of(group))),
                "relative_error": facts.errors.get(name),
            }
            for name, group in contents.layers.items()
            if not is_order(group[0])
        ],
    }


def render(found: dict[str, Any]) -> str:
    """The description as a table for people."""
    recipe = found["recipe"]
    if isinstance(recipe, dict):
        recipe = ", ".join(f"{key} {value}" for key, value in recipe.items())
    linear = found["linear_bpw"]
    facts = [
        ("file", found["file"]),
        ("model", " ".join(str(found[key]) for key in ("name", "architecture") if found[key])),
        ("made by", found["quantized_by"]),
        ("layout", found["layout"]),
        ("recipe", recipe),
        ("size", f"{found['bytes']:,} bytes, {found['parameters']:,} parameters"),
        ("bpw", f"{found['bpw']:.2f}" + ("" if linear is None else f", linear layers {linear:.2f}")),
        ("types", ", ".join(f"{count} {name}" for name, count in found["types"].items())),
    ]
    lines = [f"{label:<9}{value}" for label, value in facts if value]
    width = max((len(tensor["name"]) for tensor in found["tensors"]), default=0)
    lines += ["", f"{'tensor':<{width}}  {'shape':>16}  {'bpw':>6}  {'error':>9}  types"]
    for tensor in found["tensors"]:
        shape = " x ".join(map(str, tensor["shape"]))
        error = tensor["relative_error"]
        shown = "" if error is None else f"{error:.3g}"
        lines.append(
            f"{tensor['name']:<{width}}  {shape:>16}  {tensor['bpw']:>6.2f}  {shown:>9}  "
            + " + ".join(_pieces(tensor, found["layout"]))
        )
    return "\n".join(lines)


def _pieces(tensor: dict[str, Any], layout: str | None) -> list[str]:
    """Types of the sub-layers, with the channels of each where they share them out."""
    if layout != "split" or not tensor["channels"]:
        return list(tensor["types"])
    return [f"{width} {kind}" for width, kind in zip(tensor["channels"], tensor["types"], strict=True)]
