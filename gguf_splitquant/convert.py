"""The pipeline: source, plan, split, pack, file.

Each tensor is read, clustered, packed and written slab by slab at its place in the file, several tensors at
a time. Memory is a few slabs per thread, whatever the model's size, and the bytes do not depend on the
number of threads. Tensors that are refined with error feedback come one at a time, with all threads on
each, and are held as a whole (:mod:`.conversion`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .calibration.digest import NOT_YET, statistics_digest
from .calibration.names import HEAD
from .conversion import Conversion
from .errors import RecipeError
from .gguf_io.metadata import file_metadata
from .gguf_io.shards import ModelLayout, PartialModel, layout_model
from .gguf_io.writer import check_target
from .planning.curves import InputStatistics, weight_curves
from .planning.plan import Plan, make_plan
from .planning.refined import RefinedPlan, plan_refined, refinable_tensors
from .progress import SILENT, Progress
from .recipe import Recipe
from .sources.model import SourceModel


@dataclass(frozen=True)
class ConversionReport:
    """What was written.

    Attributes:
        path: the file; of several shards the first.
        paths: all files.
        total_bytes: their size.
        plan: what became of every tensor.
        relative_errors: per quantized weight, sum((w - decoded)**2) / sum(w**2).
        refined: types and clusters of the linear layers; None for other layouts.
    """

    path: Path
    paths: tuple[Path, ...]
    total_bytes: int
    plan: Plan
    relative_errors: Mapping[str, float]
    refined: RefinedPlan | None = None


def plan_file(
    model: SourceModel,
    recipe: Recipe,
    *,
    statistics: InputStatistics | None = None,
    refined: RefinedPlan | None = None,
    max_shard_bytes: int | None = None,
    progress: Progress = SILENT,
) -> tuple[Plan, ModelLayout, RefinedPlan | None]:
    """The plan and the exact layout of the file that :func:`convert` would write.

    Args:
        model: the source. Its linear weights are read once if types are to be chosen.
        recipe: how.
        statistics: of layer inputs; for a recipe with a target.
        refined: types and clusters, where they are already chosen.
        max_shard_bytes: size that no file exceeds, unless one tensor alone does; None: one file.
        progress: counts the weights that are read.

    Raises:
        RecipeError: the target is too small for this model.
    """
    open_choice = recipe.refined and not recipe.qtype and refined is None
    budget = _linear_budget(model, recipe) if open_choice and recipe.target_size is not None else None
    curves = weight_curves(refinable_tensors(model, recipe), statistics, progress) if open_choice else None
    chosen = refined
    for _ in range(8):
        if curves is not None:
            chosen = plan_refined(model, recipe, statistics, budget, curves)
        plan = make_plan(model, recipe, chosen)
        metadata = file_metadata(model, plan, {}, NOT_YET if recipe.refined and statistics else "")
        layout = layout_model(model.architecture, metadata, plan.outputs, max_shard_bytes)
        excess = layout.total_bytes - (recipe.target_size or layout.total_bytes)
        if budget is None or excess <= 0:
            return plan, layout, chosen
        budget -= 8 * excess  # the header and the orders take room too
    raise RecipeError("target", f"{recipe.target_size:,} bytes cannot be met", "ask for more")


def _linear_budget(model: SourceModel, recipe: Recipe) -> float:
    """Bits that a target size leaves for the linear layers, before the header is known."""
    tensors = {t.name for t in refinable_tensors(model, recipe)}
    smallest = dataclasses.replace(recipe, layout="stock", target_size=None, qtype="Q8_0")
    plan = make_plan(model, smallest)
    others = sum(t.nbytes for t in plan.tensors if t.source.name not in tensors)
    return 8.0 * ((recipe.target_size or 0) - others)


def convert(
    model: SourceModel,
    out: Path,
    recipe: Recipe,
    *,
    statistics: InputStatistics | None = None,
    refined: RefinedPlan | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> ConversionReport:
    """Write a model as GGUF.

    Args:
        model: the source.
        out: the file to write. It appears only when it is complete. Shards put their number into its name.
        recipe: how.
        statistics: of this model's layer inputs (:func:`.calibration.checkpoint.calibrate_model`, or an
            imatrix), for the refined layouts. Without them, and for a weight that they lack, all input
            channels count the same and there is no error feedback.
        refined: types and clusters, where they are already chosen.
        max_shard_bytes: size that no file exceeds, unless one tensor alone does; None: one file.
        force: replace what exists.
        threads: tensors in work at a time; all cores by default. The file does not depend on it.
        progress: told of every slab, in bytes of the checkpoint.

    Raises:
        OutputError: ``out`` cannot be written.
        CheckpointError: NaN, Inf or values beyond f16's range in a weight; a file that ends early.
        RecipeError: the target is too small for this model.
    """
    if max_shard_bytes is None:
        check_target(out, 0, force=force)
    plan, layout, chosen = plan_file(
        model,
        recipe,
        statistics=statistics,
        refined=refined,
        max_shard_bytes=max_shard_bytes,
        progress=progress,
    )
    with PartialModel(out, layout, force=force) as file:
        work = Conversion(plan, file, statistics, model.tied_head, progress)
        work.run(plan.tensors, threads or os.cpu_count() or 1)
        calibration = calibration_of(plan, statistics)
        metadata = file_metadata(model, plan, work.relative_errors, calibration)
        file.commit(metadata, model.architecture)
    return ConversionReport(file.paths[0], file.paths, layout.total_bytes, plan, work.relative_errors, chosen)


def calibration_of(plan: Plan, statistics: InputStatistics | None) -> str:
    """The digest of the statistics that a file says it was made with; empty for a recipe that uses none."""
    if statistics is None or not plan.recipe.refined:
        return ""
    # a tied head reads the embedding under the head's name
    names = dict.fromkeys([*(t.source.name for t in plan.tensors if t.refined), HEAD])
    return statistics_digest(statistics, names)


__all__ = ["ConversionReport", "calibration_of", "convert", "plan_file"]
