"""What a file will hold and where, before anything is written: its plan, its layout, its needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

from .calibration.digest import NOT_YET, statistics_digest
from .calibration.names import HEAD
from .errors import RecipeError
from .gguf_io.metadata import file_metadata
from .gguf_io.sharding import WHOLE, Shards
from .gguf_io.shards import ModelLayout, layout_model
from .planning.curves import InputStatistics, weight_curves
from .planning.plan import Plan, make_plan
from .planning.refined import RefinedPlan, plan_refined, refinable_tensors
from .progress import SILENT, Progress
from .recipe import Recipe
from .sources.model import SourceModel
from .working_set import CALIBRATED, check_limit


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
        full: whether the statistics of a weight's input are a matrix, by the weight's name; None: there are
            none yet, and the recipe says whether there will be, after a run of the model.
    """
    if memory_limit is None:
        return
    reserve = 0
    if full is None:
        measured = recipe.refined and recipe.calibration in ("self", "text")
        full = lambda _weight: measured  # noqa: E731
        reserve = CALIBRATED if measured else 0
    if recipe.refined:
        recipe = _smallest(recipe)
    check_limit(memory_limit, make_plan(model, recipe), full, reserve)


def _smallest(recipe: Recipe) -> Recipe:
    """A recipe that needs no choice of types, and refines the same weights."""
    return dataclasses.replace(recipe, layout="stock", target_bpw=None, target_size=None, qtype="Q8_0")


def calibration_of(plan: Plan, statistics: InputStatistics | None) -> str:
    """The digest of the statistics that a file says it was made with; empty for a recipe that uses none."""
    if statistics is None or not plan.recipe.refined:
        return ""
    # a tied head reads the embedding under the head's name
    names = dict.fromkeys([*(t.source.name for t in plan.tensors if t.refined), HEAD])
    return statistics_digest(statistics, names)
