"""The pipeline: source, plan, split, pack, file.

Each tensor is read, clustered, packed and written slab by slab at its place in the file, several tensors at
a time. Memory is a few slabs per thread, whatever the model's size, and the bytes do not depend on the
number of threads. Tensors that are refined with error feedback come one at a time, with all threads on
each, some rows at a time (:mod:`.conversion`); the second moments of a layer's input and their factors are
held as a whole. A memory limit chooses how much is in work at once (:mod:`.working_set`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .conversion import Conversion
from .errors import OutputError
from .file_plan import calibration_of, check_memory, plan_file
from .gguf_io.journal import Journal, check_not_interrupted, journal_path
from .gguf_io.metadata import file_metadata
from .gguf_io.output import PartialModel
from .gguf_io.sharding import WHOLE, Shards
from .gguf_io.writer import check_target
from .planning.curves import InputStatistics
from .planning.plan import Plan
from .planning.refined import RefinedPlan
from .progress import SILENT, Progress
from .recipe import Recipe
from .resuming import check_layout, check_settings, head_of, recorded_plan, settings_of
from .sources.model import SourceModel
from .verification.completed import find_completed
from .working_set import has_matrix


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
        complete_before: an earlier run had written all of it.
    """

    path: Path
    paths: tuple[Path, ...]
    total_bytes: int
    plan: Plan
    relative_errors: Mapping[str, float]
    refined: RefinedPlan | None = None
    rare_experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    complete_before: bool = False


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
            the same, to the byte. One that is there, complete and this conversion's own, is left as it is.
        threads: tensors in work at a time; all cores by default. The file does not depend on it.
        memory_limit: bytes that the process stays below, or says that it cannot; None: no limit. The file
            does not depend on it.
        progress: told of every slab, in bytes of the checkpoint.

    Raises:
        OutputError: ``out`` cannot be written or is what is read, another process writes it, or an
            interrupted run is there that has other settings or that neither ``resume`` nor ``force`` says
            what to do with.
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
    check_not_source(model, *layout.paths(out))

    def report(errors: Mapping[str, float], *, complete_before: bool = False) -> ConversionReport:
        paths, rare = layout.paths(out), _rare_experts(plan, statistics)
        return ConversionReport(
            paths[0], paths, layout.total_bytes, plan, errors, chosen, rare, complete_before
        )

    journal = None
    if model.files and resume and not journal_path(target).exists():
        errors = find_completed(
            model,
            plan,
            layout,
            out,
            statistics=statistics,
            threads=threads,
            memory_limit=memory_limit,
            progress=progress,
        )
        if errors is not None:
            return report(errors, complete_before=True)
    if model.files:
        settings = settings_of(model, recipe, statistics, shards)
        journal = _open_journal(target, resume, head_of(settings, plan, layout, chosen, out))
    with PartialModel(out, layout, force=force, journal=journal) as file:
        complete = journal.done if journal is not None else {}
        work = Conversion(plan, file, statistics, model.tied_head, progress, file.complete)
        work.relative_errors.update((n, e) for n, e in complete.items() if e is not None)
        missing = [t for t in plan.tensors if t.source.name not in complete and layout.holds(t.outputs)]
        work.run(missing, threads or os.cpu_count() or 1, memory_limit)
        calibration = calibration_of(plan, statistics)
        metadata = partial(file_metadata, model, plan, work.relative_errors, calibration)
        file.commit(model.architecture, metadata)
    return report(work.relative_errors)


def check_not_source(model: SourceModel, *paths: Path) -> None:
    """Raise OutputError if one of ``paths`` is a file that the model is read from. (A link to it is not.)"""
    for path in paths:
        # these say no of a name that the file system refuses
        if os.path.islink(path) or not os.path.isfile(path):  # noqa: PTH113, PTH114
            continue
        if any(path.samefile(source) for source in model.files):
            raise OutputError(path, "is the model that is read", "choose another name")


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


__all__ = ["ConversionReport", "convert"]
