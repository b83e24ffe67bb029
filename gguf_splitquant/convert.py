"""The pipeline: source, plan, split, pack, file.

Each tensor is read, clustered, packed and written slab by slab at its place in the file, several tensors at
a time. Memory is a few slabs per thread, whatever the model's size, and the bytes do not depend on the
number of threads. Tensors that are refined with error feedback come one at a time, with all threads on
each, some rows at a time (:mod:`.conversion`); the second moments of a layer's input and their factors are
held as a whole. A memory limit chooses how much is in work at once (:mod:`.working_set`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .calibration.digest import NOT_YET, statistics_digest
from .calibration.names import HEAD
from .conversion import Conversion
from .errors import RecipeError
from .gguf_io.journal import Journal, check_not_interrupted
from .gguf_io.metadata import file_metadata
from .gguf_io.output import PartialModel
from .gguf_io.sharding import WHOLE, Shards
from .gguf_io.shards import ModelLayout, layout_model
from .gguf_io.writer import check_target
from .planning.curves import InputStatistics, weight_curves
from .planning.plan import Plan, make_plan
from .planning.refined import RefinedPlan, plan_refined, refinable_tensors
from .progress import SILENT, Progress
from .recipe import Recipe
from .resuming import check_layout, check_settings, head_of, recorded_plan, settings_of
from .sources.model import SourceModel
from .working_set import check_limit, has_matrix


@dataclass(frozen=True)
class ConversionReport:
    """What was written.

    Attributes:
        path: the file; of several shards the first.
        paths: all files that were written.
        total_bytes: their size.
        plan: what became of every tensor.
        relative_errors: per quantized weight of these files, sum((w - decoded)**2) / sum(w**2).
        refined: types and clusters of the linear layers; None for other layouts.
        rare_experts: by stack, the experts that the calibration text reached too seldom for statistics of
            their own: theirs are mostly, or wholly, those of all the stack's experts together.
    """

    path: Path
    paths: tuple[Path, ...]
    total_bytes: int
    plan: Plan
    relative_errors: Mapping[str, float]
    refined: RefinedPlan | None = None
    rare_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def plan_file(
    model: SourceModel,
    recipe: Recipe,
    *,
    statistics: InputStatistics | None = None,
    refined: RefinedPlan | None = None,
    shards: Shards = WHOLE,
    progress: Progress = SILENT,
) -> tuple[Plan, ModelLayout, RefinedPlan | None]:
    """The plan and the exact layout of the file that :func:`convert` would write.

    Args:
        model: the source. Its linear weights are read once if types are to be chosen.
        recipe: how.
        statistics: of layer inputs; for a recipe with a target.
        refined: types and clusters, where they are already chosen.
        shards: into how many files, and which of them.
        progress: counts the weights that are read.

    Raises:
        RecipeError: the target is too small for this model.
        OutputError: there are too many shards, or not the one that is asked for.
    """
    open_choice = recipe.refined and not recipe.qtype and refined is None
    budget = _linear_budget(model, recipe) if open_choice and recipe.target_size is not None else None
    curves = weight_curves(refinable_tensors(model, recipe), statistics, progress) if open_choice else None
    chosen = refined
    for _ in range(8):
        if curves is not None:
            chosen = plan_refined(model, recipe, statistics, budget, curves)
        plan = make_plan(model, recipe, chosen)
        weights = [t.outputs for t in plan.tensors]
        calibration = NOT_YET if recipe.refined and statistics else ""
        metadata = partial(file_metadata, model, plan, {}, calibration)
        layout = layout_model(model.architecture, metadata, weights, shards)
        excess = layout.whole_bytes - (recipe.target_size or layout.whole_bytes)
        if budget is None or excess <= 0:
            return plan, layout, chosen
        budget -= 8 * excess  # the header and the orders take room too
    raise RecipeError("target", f"{recipe.target_size:,} bytes cannot be met", "ask for more")


def expected_bytes(model: SourceModel, recipe: Recipe) -> int:
    """About the size of the file, before there are statistics to plan with."""
    if not recipe.refined or recipe.qtype:
        return sum(t.nbytes for t in make_plan(model, recipe).tensors)
    if recipe.target_size is not None:
        return recipe.target_size
    assert recipe.target_bpw is not None
    linear = sum(t.n_params for t in refinable_tensors(model, recipe))
    return _other_bytes(model, recipe) + int(recipe.target_bpw * linear / 8)


def _linear_budget(model: SourceModel, recipe: Recipe) -> float:
    """Bits that a target size leaves for the linear layers, before the header is known."""
    return 8.0 * ((recipe.target_size or 0) - _other_bytes(model, recipe))


def _other_bytes(model: SourceModel, recipe: Recipe) -> int:
    """Bytes of all that is not quantized with error feedback under a target."""
    tensors = {t.name for t in refinable_tensors(model, recipe)}
    plan = make_plan(model, _smallest(recipe))
    return sum(t.nbytes for t in plan.tensors if t.source.name not in tensors)


def check_memory(
    model: SourceModel, recipe: Recipe, memory_limit: int | None, full: Callable[[str], bool] | None = None
) -> None:
    """Raise RecipeError if the conversion cannot stay below ``memory_limit`` bytes; reads no weights.

    Args:
        model: the source.
        recipe: how.
        memory_limit: bytes for the whole process; None: no limit.
        full: whether the statistics of a weight's input will be a matrix, by the weight's name; None: the
            recipe says it.
    """
    if memory_limit is None:
        return
    if full is None:
        measured = recipe.calibration in ("self", "text")
        full = lambda _weight: measured  # noqa: E731
    if recipe.refined:
        recipe = _smallest(recipe)
    check_limit(memory_limit, make_plan(model, recipe), full)


def _smallest(recipe: Recipe) -> Recipe:
    """A recipe that needs no choice of types, and refines the same weights."""
    return dataclasses.replace(recipe, layout="stock", target_bpw=None, target_size=None, qtype="Q8_0")


def convert(
    model: SourceModel,
    out: Path,
    recipe: Recipe,
    *,
    statistics: InputStatistics | None = None,
    refined: RefinedPlan | None = None,
    shards: Shards = WHOLE,
    force: bool = False,
    resume: bool = False,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Write a model as GGUF.

    What is wrong with the model leaves nothing behind. An interruption and a full disk leave the tensors that
    are complete, in ``OUT.partial`` with ``OUT.journal``, to be gone on with; a model in memory (without
    :attr:`~.sources.model.SourceModel.files`) cannot be recognized, so nothing is left of it.

    Args:
        model: the source.
        out: the file to write. It appears only when it is complete. Shards put their number into its name.
        recipe: how.
        statistics: of this model's layer inputs (:func:`.calibration.checkpoint.calibrate_model`, or an
            imatrix), for the refined layouts. Without them, and for a weight that they lack, all input
            channels count the same and there is no error feedback.
        refined: types and clusters, where they are already chosen.
        shards: into how many files, and which of them.
        force: replace what exists; without ``resume`` also what an interrupted run left.
        resume: go on where an interrupted run stopped, with its plan, or begin if there is none. The file is
            the same, to the byte.
        threads: tensors in work at a time; all cores by default. The file does not depend on it.
        memory_limit: bytes that the process stays below, or says that it cannot; None: no limit. The file
            does not depend on it.
        progress: told of every slab, in bytes of the checkpoint.

    Raises:
        OutputError: ``out`` cannot be written, another process writes it, or an interrupted run is there
            that has other settings or that neither ``resume`` nor ``force`` says what to do with.
        CheckpointError: NaN, Inf or values beyond f16's range in a weight; a file that ends early.
        RecipeError: the target is too small for this model, or the memory limit for one of its tensors.
    """
    check_memory(model, recipe, memory_limit, lambda weight: has_matrix(statistics, weight))
    target = shards.target(out)
    if model.files and resume:
        refined = refined or recorded_plan(out, model, recipe, statistics, shards)
    elif model.files and not force:
        check_not_interrupted(target)
    if not shards.several and not resume:
        check_target(out, 0, force=force)
    plan, layout, chosen = plan_file(
        model, recipe, statistics=statistics, refined=refined, shards=shards, progress=progress
    )
    journal = None
    if model.files:
        settings = settings_of(model, recipe, statistics, shards)
        journal = _open_journal(target, resume, head_of(settings, plan, layout, chosen, out))
    with PartialModel(out, layout, force=force, journal=journal) as file:
        complete = journal.done if journal is not None else {}
        work = Conversion(plan, file, statistics, model.tied_head, progress, file.complete)
        work.relative_errors.update((n, e) for n, e in complete.items() if e is not None)
        missing = [
            t
            for t in plan.tensors
            if t.source.name not in complete and any(layout.place_of(o.name) for o in t.outputs)
        ]
        work.run(missing, threads or os.cpu_count() or 1, memory_limit)
        calibration = calibration_of(plan, statistics)
        metadata = partial(file_metadata, model, plan, work.relative_errors, calibration)
        file.commit(model.architecture, metadata)
    return ConversionReport(
        file.paths[0],
        file.paths,
        layout.total_bytes,
        plan,
        work.relative_errors,
        chosen,
        _rare_experts(plan, statistics),
    )


def calibration_of(plan: Plan, statistics: InputStatistics | None) -> str:
    """The digest of the statistics that a file says it was made with; empty for a recipe that uses none."""
    if statistics is None or not plan.recipe.refined:
        return ""
    # a tied head reads the embedding under the head's name
    names = dict.fromkeys([*(t.source.name for t in plan.tensors if t.refined), HEAD])
    return statistics_digest(statistics, names)


def _rare_experts(plan: Plan, statistics: InputStatistics | None) -> dict[str, tuple[int, ...]]:
    if statistics is None:
        return {}
    used = {t.source.name: statistics.experts(t.source.name) for t in plan.tensors if t.refined}
    return {name: use.rare for name, use in used.items() if use and use.rare}


def _open_journal(target: Path, resume: bool, head: Mapping[str, Any]) -> Journal:
    """The journal of ``target``, begun or to be gone on with."""
    journal = Journal.open(target, discard=not resume)
    try:
        if journal.begun:
            check_settings(journal, head["settings"])
            check_layout(journal, head)
        else:
            journal.begin(head)
    except BaseException:
        journal.close()
        raise
    return journal


__all__ = ["ConversionReport", "calibration_of", "check_memory", "convert", "expected_bytes", "plan_file"]
