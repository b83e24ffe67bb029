"""How much memory the conversion of a tensor takes, and what may be in work at a time under a limit.

The bytes of the file do not depend on it: rows are quantized independently of each other, in pieces whose
size is fixed, and errors are added up exactly. So a limit only chooses how many pieces are there at once.

The limit counts the whole process as it is when tensors begin: interpreter, libraries, the model's header.
The figures below are peaks of whole processes, measured and rounded up by about a fifth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from gguf import GGMLQuantizationType

from .errors import RecipeError
from .memory import resident_bytes
from .planning.curves import InputStatistics
from .planning.plan import Plan, TensorPlan
from .planning.roles import Role
from .recipe import Recipe
from .sources.model import FloatType
from .splitting.histogram import SLAB_VALUES

_REFINED_VALUES = 1 << 23
"""Values of a refined tensor in work without a limit, where its rows are short."""

_COPIED, _COMPUTED = 14, 44
"""Bytes per value of a slab: copied or looked up; and where codes are computed in float32."""

_BINNED = 96 << 20
"""Bytes for the bins of a large F32 tensor's histogram."""

_REFINED = 34
"""Bytes per value of the rows in work of a refined tensor: as read, in float32, as they are quantized."""

METRIC_BYTES = 17
"""Bytes per entry of a layer input's second moments: mapped, scaled, and factored."""

_COMPILER = 72 << 20
"""What numba takes when it loads, or first compiles, the inner loops."""

_HEADROOM = 8 << 20

CALIBRATED = 160 << 20
"""What a calibration leaves in the process: llama.cpp, and pieces of its memory."""


@dataclass(frozen=True)
class WorkingSet:
    """What may be in work at a time.

    Attributes:
        plan: of the whole file.
        threads: worker threads that there are.
        room: bytes for all of them; None: no limit.
    """

    plan: Plan
    threads: int
    room: int | None = None

    @classmethod
    def under(cls, limit: int | None, plan: Plan, threads: int) -> WorkingSet:
        """What a limit for the whole process leaves now."""
        return cls(plan, threads, None if limit is None else max(0, limit - _base_bytes(plan)))

    def tensors(self, plans: Iterable[TensorPlan]) -> int:
        """How many tensors that are not refined can be in work."""
        largest = max((_slab_bytes(plan, self.plan.recipe) for plan in plans), default=1)
        return self.threads if self.room is None else max(1, min(self.threads, self.room // largest))

    def rows(self, plan: TensorPlan, full: bool) -> int:
        """How many rows of a refined tensor can be in work: whole pieces of those quantized together.

        Args:
            plan: of the tensor.
            full: the statistics of its input are a matrix.
        """
        from .refining.feedback import CHUNK_ROWS

        columns = plan.source.shape[-1]
        pieces = max(self.threads, _REFINED_VALUES // (CHUNK_ROWS * columns))
        if self.room is not None:
            left = self.room - _metric_bytes(plan, full)
            pieces = max(1, min(pieces, left // (_REFINED * CHUNK_ROWS * columns)))
        return CHUNK_ROWS * pieces


def check_limit(limit: int | None, plan: Plan, full: Callable[[str], bool], reserve: int = 0) -> None:
    """Raise RecipeError if a tensor of ``plan`` cannot be converted under ``limit``.

    Args:
        limit: bytes for the whole process; None: none.
        plan: of the file; what types it gives makes no difference.
        full: whether the statistics of a weight's input are a matrix, by the weight's name.
        reserve: bytes that will be taken until tensors begin.
    """
    if limit is None:
        return
    least = [(_least_bytes(t, plan.recipe, full(t.source.name)), t.source.name) for t in plan.tensors]
    most, name = max(least, default=(0, ""))
    base = _base_bytes(plan) + reserve
    if base + most > limit:
        # what everything else takes differs a little from run to run
        enough = math.ceil(1.05 * (base + most) / 1e7) * 10
        raise RecipeError(
            "memory limit",
            f"{limit:,} bytes are too few: {name} takes {most:,} at least, everything else {base:,}",
            f"allow {enough}MB or more",
        )


def has_matrix(statistics: InputStatistics | None, weight: str) -> bool:
    """The statistics know the whole second moments of a weight's input, not only their diagonal."""
    known = statistics is not None and statistics.input_of(weight) is not None
    return known and statistics is not None and statistics.matrix(weight).ndim == 2


def _least_bytes(plan: TensorPlan, recipe: Recipe, full: bool) -> int:
    """Memory without which a tensor cannot be converted."""
    if not plan.refined:
        return _slab_bytes(plan, recipe)
    from .refining.feedback import CHUNK_ROWS

    rows = min(math.prod(plan.source.shape[:-1]), CHUNK_ROWS)
    return _metric_bytes(plan, full) + _REFINED * rows * plan.source.shape[-1]


def _slab_bytes(plan: TensorPlan, recipe: Recipe) -> int:
    """Memory for one slab of a tensor that is not refined."""
    source = plan.source
    values = min(source.n_params, max(SLAB_VALUES, source.n_params // max(1, source.shape[0])))
    looked_up = source.dtype is not FloatType.F32 and recipe.granularity == "tensor"
    if not plan.quantized or (plan.encoding is not None and looked_up):
        return _COPIED * values
    return _COMPUTED * values + (_BINNED if source.dtype is FloatType.F32 else 0)


def _metric_bytes(plan: TensorPlan, full: bool) -> int:
    """The second moments of a layer's input, and their factors."""
    columns = plan.source.shape[-1]
    rounded = plan.role is Role.EMBEDDING and plan.outputs[0].qtype is GGMLQuantizationType.Q8_0
    return METRIC_BYTES * columns * columns if full and not rounded else 0


def _base_bytes(plan: Plan) -> int:
    """What the process takes before a tensor is read: with the compiled loops, and what comes with them."""
    loops = False
    if any(t.refined for t in plan.tensors):
        from .refining import weights  # noqa: F401

        loops = True
    if any(t.encoding for t in plan.tensors):
        from .packing import kernels  # noqa: F401

        loops = True
    return resident_bytes() + _HEADROOM + (_COMPILER if loops else 0)
