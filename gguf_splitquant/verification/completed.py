"""Files that are there already: are they what this conversion would write?

A conversion can be killed when its files have their names and before it could say so. The same command is
then to find its work done. A name proves nothing, so sizes and headers are compared to the byte (recipe,
types, places, the digest of the statistics are in them), and one weight of every kind is made again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from ..conversion import Conversion
from ..errors import GGUFError
from ..file_plan import calibration_of
from ..gguf_io.header import TensorEntry, read_file_header
from ..gguf_io.metadata import KEY_RECIPE, errors_in, file_metadata
from ..gguf_io.shards import ModelLayout
from ..planning.curves import InputStatistics
from ..planning.plan import Plan
from ..progress import SILENT, Progress
from ..recipe import Recipe
from ..sources.model import SourceModel
from .comparing import Comparing, sample_of


def find_completed(
    model: SourceModel,
    plan: Plan,
    layout: ModelLayout,
    out: Path,
    *,
    statistics: InputStatistics | None = None,
    threads: int | None = None,
    memory_limit: int | None = None,
    progress: Progress = SILENT,
) -> Mapping[str, float] | None:
    """The relative errors of complete files of this conversion; None: they are not there, or not its own.

    Args:
        model: the source.
        plan: of the whole model.
        layout: of the files that the conversion would write.
        out: the file; of several the name before the number.
        statistics: of layer inputs, where the recipe uses any.
        threads: None is all cores.
        memory_limit: bytes for the whole process; None: no limit.
        progress: told of every slab that is made again.

    Raises:
        CheckpointError: the source cannot be read.
    """
    paths = dict(zip(layout.written, layout.paths(out), strict=True))
    if not all(
        path.is_file() and path.stat().st_size == layout.files[number].total_bytes
        for number, path in paths.items()
    ):
        return None
    try:
        metadata_there = [read_file_header(path).metadata for path in paths.values()]
    except GGUFError:
        return None
    errors = {name: e for there in metadata_there for name, e in errors_in(there).items()}
    metadata = partial(file_metadata, model, plan, errors, calibration_of(plan, statistics))
    for number, header in layout.headers(model.architecture, metadata).items():
        with paths[number].open("rb") as file:
            if file.read(len(header)) != header:
                return None
    sink = Comparing(_entries(layout, paths))
    work = Conversion(plan, sink, statistics, model.tied_head, progress)
    here = [t for t in plan.tensors if layout.holds(t.outputs)]
    work.run(sample_of(here, 0, 0), threads or os.cpu_count() or 1, memory_limit)
    same = all(np.float32(errors[name]) == np.float32(e) for name, e in work.relative_errors.items())
    return errors if same and not sink.wrong() else None


def says_other_recipe(path: Path, recipe: Recipe) -> bool:
    """Whether a file is certainly not one that ``recipe`` makes, by what it says about itself.

    A file that says nothing (float layouts, shards after the first) may be.
    """
    try:
        said = read_file_header(path).metadata.get(KEY_RECIPE)
    except GGUFError:
        return True
    return said is not None and (recipe.layout == "float" or said != recipe.to_json())


def _entries(layout: ModelLayout, paths: Mapping[int, Path]) -> list[TensorEntry]:
    return [
        TensorEntry(o.name, o.shape, o.qtype, layout.files[number].offsets[o.name], o.nbytes, path)
        for number, path in paths.items()
        for o in layout.outputs[number]
    ]
