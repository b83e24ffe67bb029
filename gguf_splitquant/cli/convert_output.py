"""What ``convert`` writes, and what it says about it: names, Modelfile, model card, summary."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..convert import ConversionReport
    from ..gguf_io.sharding import Shards
    from ..gguf_io.shards import ModelLayout
    from ..planning import Plan, RefinedPlan
    from ..recipe import Recipe
    from ..sources.model import SourceModel


_SHOWN_EXPERTS = 8


def check_outputs(args: argparse.Namespace, recipe: Recipe, shards: Shards) -> None:
    """Raise before any work where a file cannot be written, or Ollama's name is not one."""
    from ..gguf_io.journal import check_not_interrupted
    from ..gguf_io.writer import check_target
    from ..publishing.ollama import check_name

    if args.ollama:
        check_name(args.ollama)
    if args.plan:
        check_target(args.plan, 0, force=args.force or args.resume)
    if args.dry_run:
        return
    if args.out.is_dir():
        # the name comes later: for now only the folder is looked at
        check_target(args.out / "model.gguf", 0, force=True)
    else:
        target = shards.target(args.out)
        # shards have other names
        elsewhere = shards.several and shards.only is None
        check_target(target, 0, force=args.force or elsewhere or _may_be_complete(args, recipe, target))
        if not args.force and not args.resume:
            check_not_interrupted(target)
    companions = [args.model_card] if args.model_card else []
    if args.ollama and not args.out.is_dir():
        companions.append(modelfile_path(args.out))
    for companion in companions:
        # what is there beside a complete file is compared when there is something to compare with
        later = args.resume and (args.out.is_dir() or shards.several or args.out.exists())
        check_target(companion, 0, force=args.force or later)


def _may_be_complete(args: argparse.Namespace, recipe: Recipe, target: Path) -> bool:
    """What has the target's name can be what the same command wrote before it was killed."""
    from ..gguf_io.journal import journal_path
    from ..verification.completed import says_other_recipe

    if not args.resume:
        return False
    return journal_path(target).exists() or not (target.is_file() and says_other_recipe(target, recipe))


def _write_companion(target: Path, text: str, *, force: bool, resume: bool) -> None:
    """A document beside the output; one with the same text may be there already where a run goes on."""
    from ..gguf_io.writer import check_target
    from ..replacing import write_text

    if resume and target.is_file() and target.read_bytes() == text.encode():
        return
    check_target(target, 0, force=force)
    write_text(target, text)


def write_plan(args: argparse.Namespace, recipe: Recipe, refined: RefinedPlan) -> None:
    """The types and clusters, as JSON."""
    _write_companion(args.plan, refined.text(recipe), force=args.force, resume=args.resume)


def out_path(args: argparse.Namespace, model: SourceModel, plan: Plan, source: Path) -> Path:
    """The file to write: OUT, or a name in the folder OUT that says what it is."""
    from ..publishing.naming import file_name

    out: Path = args.out
    if not out.is_dir():
        return out
    return out / file_name(model, plan, source.stem if source.is_file() else source.name)


def check_for_ollama(plan: Plan, layout: ModelLayout) -> None:
    """Raise RecipeError unless Ollama loads the file."""
    from ..errors import RecipeError
    from ..publishing.ollama import check_plan

    check_plan(plan)
    if len(layout.files) > 1:
        raise RecipeError(
            "--ollama", "Ollama takes one file, not shards", "leave --max-shard-size and --shards out"
        )


def write_modelfile(args: argparse.Namespace, model: SourceModel, path: Path) -> None:
    """The Modelfile beside ``path``, and the command that takes it."""
    from ..publishing.ollama import make_modelfile

    target = modelfile_path(path)
    modelfile = make_modelfile(path.name, model.metadata)
    _write_companion(target, modelfile.text, force=args.force, resume=args.resume)
    for note in modelfile.notes:
        print(f"note: {target.name}: {note}", file=sys.stderr)
    print(f"  for Ollama: {shlex.join(['ollama', 'create', args.ollama, '-f', str(target)])}")


def modelfile_path(out: Path) -> Path:
    """``model.gguf`` has ``model.Modelfile`` beside it."""
    return out.with_name(f"{out.name.removesuffix('.gguf')}.Modelfile")


def write_model_card(args: argparse.Namespace, path: Path, *, resume: bool = False) -> None:
    """The snippet for a model card of the file."""
    from ..evaluation.contents import read_contents
    from ..publishing.model_card import model_card, read_results

    results = read_results(args.results) if args.results else None
    card = model_card(read_contents(path), results)
    _write_companion(args.model_card, card, force=args.force, resume=resume)
    print(f"  model card: {args.model_card}")


def print_plan(plan: Plan, layout: ModelLayout) -> None:
    """Every tensor, then the size."""
    width = max(len(o.name) for o in plan.outputs)
    for tensor in plan.tensors:
        for output in tensor.outputs:
            shape = " x ".join(str(n) for n in output.shape)
            note = f"  ({tensor.note})" if tensor.note else ""
            print(f"{output.name:<{width}}  {output.qtype.name:<5}  {output.nbytes:>14,}  {shape}{note}")
    count = len(layout.files)
    files = f" in {count} files" if count > 1 else ""
    if layout.only is not None:
        print(f"file {layout.only + 1} of {count} has {layout.total_bytes:,} bytes")
    print(_sizes(plan, layout.whole_bytes, files))


def print_summary(report: ConversionReport, shards: Shards, seconds: float, model: str) -> None:
    """What was written, and what runs it."""
    from ..gguf_io.header import SHARD_NAME

    when = "complete already" if report.complete_before else f"in {seconds:.1f} s"
    if shards.only is not None and shards.only[1] > 1:
        number, count = shards.only
        print(f"{report.path}: {report.total_bytes:,} bytes, file {number} of {count}, {when}")
        return
    files = f" in {len(report.paths)} files" if len(report.paths) > 1 else ""
    print(f"{report.path}: {_sizes(report.plan, report.total_bytes, files)}, {when}")
    if report.refined and report.refined.predicted_kld is not None:
        print(f"  predicted mean KLD to the float model, on its own text: {report.refined.predicted_kld:.3f}")
    kept = [t for t in report.plan.tensors if t.note]
    if kept:
        print(f"  {len(kept)} tensors not as asked: {kept[0].source.name}: {kept[0].note}", file=sys.stderr)
    if report.rare_experts:
        print(f"  {_rare_experts(report)}")
    if any(len(t.outputs) > 1 for t in report.plan.tensors):
        stem = SHARD_NAME.sub("", report.path.name).removesuffix(".gguf")
        stock = report.path.with_name(f"{stem}-stock.gguf")
        command = ["python", "convert_splitquant.py", model, str(stock), "--recipe", "stock"]
        print("  needs the patched llama.cpp: gguf-splitquant build-runtime")
        print(f"  for any llama.cpp: {shlex.join(command)}")
    elif report.plan.recipe.refined:
        print("  runs in any llama.cpp")


def _rare_experts(report: ConversionReport) -> str:
    """How many experts were calibrated with the statistics of all, and where most of them are."""
    count = sum(map(len, report.rare_experts.values()))
    of = sum(t.source.shape[0] for t in report.plan.tensors if t.refined and len(t.source.shape) > 2)
    worst = max(report.rare_experts, key=lambda name: len(report.rare_experts[name]))
    rare = report.rare_experts[worst]
    which = ", ".join(map(str, rare[:_SHOWN_EXPERTS])) + (", ..." if len(rare) > _SHOWN_EXPERTS else "")
    return (
        f"{count:,} of {of:,} expert weights: too few tokens reached them, mostly the statistics of all "
        f"experts together were used (most of them in {worst}: experts {which})"
    )


def _sizes(plan: Plan, total_bytes: int, files: str) -> str:
    from ..planning import Role

    sub_layers = sum(len(t.sub_layers) - 1 for t in plan.tensors)
    return (
        f"{total_bytes:,} bytes{files}, {len(plan.tensors)} tensors and {sub_layers} extra sub-layers, "
        f"{plan.bpw(Role.LINEAR):.2f} bpw in linear layers, {plan.bpw():.2f} over all"
    )
