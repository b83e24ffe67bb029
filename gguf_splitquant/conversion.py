"""Every tensor of a plan becomes its bytes: read, split, packed or refined, and handed to a sink.

What a tensor becomes depends on the plan, the statistics and its own values alone. So tensors can be
converted in any order, some of them or all, and a sink may write them or compare them with a file.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from .calibration.names import HEAD
from .errors import CheckpointError
from .lookahead import one_ahead
from .packing.sublayers import SubLayerPacker
from .planning.curves import InputStatistics
from .planning.plan import Plan, TensorPlan
from .planning.roles import Role
from .progress import SILENT, Progress
from .sources.model import to_float32
from .splitting.histogram import ValueHistogram, check_finite, row_slabs
from .splitting.values import fit_value_split, float_sub_layers
from .working_set import WorkingSet, has_matrix

if TYPE_CHECKING:
    from .refining.feedback import RefinedRows
    from .refining.weights import ExpectedWeight, WeightRefiner


_FORESIGHT = 8
"""Weights to look ahead for what can be factored meanwhile: a layer has seven."""


class TensorSink(Protocol):
    """Takes the bytes of output tensors, slab by slab, from any thread."""

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        """``data`` belongs at byte ``position`` of the output tensor ``tensor``."""


Complete = Callable[[str, Sequence[str], float | None], None]
"""Takes the name of a weight that is done, the tensors that it became, its relative error if it has one."""


@dataclass(frozen=True)
class _Slab:
    """Rows of a tensor that is refined.

    Attributes:
        index: of the tensor, in the order in which they are refined.
        first: number of the first row, counted over all experts of a stack.
        expert: of a stack, the one that the rows belong to.
        weight: float32 (rows, columns).
        ends: these are the tensor's last rows.
    """

    index: int
    first: int
    expert: int | None
    weight: NDArray[np.float32]
    ends: bool


class Conversion:
    """One run over the tensors of a plan: what the worker threads share.

    Args:
        plan: of the whole file.
        sink: takes the bytes.
        statistics: of layer inputs, for tensors that are refined.
        tied_head: the output head is the token embedding.
        progress: told of every slab, in bytes of the checkpoint.
        complete: told of every weight that is done, from any thread.

    Attributes:
        relative_errors: per quantized weight that is done, sum((w - decoded)**2) / sum(w**2).
    """

    def __init__(
        self,
        plan: Plan,
        sink: TensorSink,
        statistics: InputStatistics | None,
        tied_head: bool,
        progress: Progress = SILENT,
        complete: Complete | None = None,
    ) -> None:
        self._plan = plan
        self._complete = complete
        self._sink = sink
        self._statistics = statistics
        self._tied_head = tied_head
        self._progress = progress
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self.relative_errors: dict[str, float] = {}

    def run(self, tensors: Sequence[TensorPlan], threads: int, memory_limit: int | None = None) -> None:
        """Convert ``tensors`` of the plan.

        Args:
            tensors: some, or all.
            threads: worker threads; the bytes do not depend on their number.
            memory_limit: bytes that the process should stay below; nor do they depend on it.

        Raises:
            CheckpointError: NaN, Inf or values beyond f16's range in a weight; a file that ends early.
        """
        simple = [t for t in tensors if not t.refined]
        working = WorkingSet.under(memory_limit, self._plan, threads)
        total = sum(t.source.nbytes for t in tensors)
        self._progress.start("convert", total, "B")
        with ThreadPoolExecutor(working.tensors(simple), thread_name_prefix="convert") as pool:
            futures = [pool.submit(self._convert_tensor, t) for t in simple]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                # after a failure or Ctrl-C the other workers stop at their next slab
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
            # of several failures the first in file order
            for future in futures:
                if future in done:
                    future.result()
        self._stop.clear()
        self._refine([t for t in tensors if t.refined], threads, memory_limit)
        self._progress.finish()

    def _refine(self, tensors: Sequence[TensorPlan], threads: int, memory_limit: int | None) -> None:
        """Quantize with error feedback, tensor by tensor, some rows at a time."""
        if not tensors:
            return
        # numba and its compiler: only for those who need them
        from .linear_algebra import blas_threads
        from .refining.weights import WeightRefiner

        ordered = self._by_input(tensors)
        working = WorkingSet.under(memory_limit, self._plan, threads)
        lost: list[float] = []
        power: list[float] = []
        slabs = self._slabs(ordered, working)
        if memory_limit is None:  # otherwise neither the next rows nor the factors of two inputs at once
            slabs = one_ahead(slabs)
        with closing(slabs), blas_threads(1), WeightRefiner(self._statistics, threads) as refiner:
            for slab in slabs:
                plan = ordered[slab.index]
                if memory_limit is None and slab.first == 0:
                    following = ordered[slab.index + 1 : slab.index + 1 + _FORESIGHT]
                    refiner.expect([self._expected(t) for t in following])
                rows = self._refine_slab(plan, slab, refiner)
                lost.extend(rows.errors)
                power.extend(rows.powers)
                if slab.ends:
                    self._finish_refined(plan, lost, power)
                    lost, power = [], []

    def _finish_refined(self, plan: TensorPlan, lost: Sequence[float], power: Sequence[float]) -> None:
        if plan.order is not None and len(plan.outputs) > len(plan.sub_layers):
            self._sink.write(plan.order.name, 0, plan.order.stored.data)
        # exact sums: they do not depend on how many rows there were at a time
        total = math.fsum(power)
        self._record_error(plan, math.fsum(lost) / total if total else 0.0)
        self._finish(plan)

    def _slabs(self, tensors: Sequence[TensorPlan], working: WorkingSet) -> Generator[_Slab, None, None]:
        """The rows of refined tensors, read and ready."""
        for index, plan in enumerate(tensors):
            rows = working.rows(plan, has_matrix(self._statistics, self._reads(plan)))
            outer, stack = plan.source.shape[0], len(plan.source.shape) > 2
            step = 1 if stack else rows  # an expert is read as a whole
            for first in range(0, outer, step):
                raw = plan.source.read_rows(first, min(first + step, outer))
                check_finite(plan.source, first, raw)
                matrix = raw.reshape(-1, raw.shape[-1])
                above = first * len(matrix) // len(raw)
                for start in range(0, len(matrix), rows):
                    weight = to_float32(matrix[start : start + rows], plan.source.dtype)
                    ends = first + len(raw) == outer and start + rows >= len(matrix)
                    yield _Slab(index, above + start, first if stack else None, weight, ends)

    def _refine_slab(self, plan: TensorPlan, slab: _Slab, refiner: WeightRefiner) -> RefinedRows:
        """Quantize and write some rows."""
        pieces, order = _clusters(plan)
        if plan.role is Role.EMBEDDING and pieces[0][0] is GGMLQuantizationType.Q8_0:
            # a look-up table of 8 bits gains nothing from feedback, and vocabularies are large
            rows = refiner.round(slab.weight)
        else:
            rows = refiner.refine(self._reads(plan), slab.weight, pieces, order, slab.expert)
        for output, packed in zip(plan.sub_layers, rows.packed, strict=True):
            self._sink.write(output.name, slab.first * output.row_bytes, packed.data)
        self._advance(plan, slab.weight.size * plan.source.dtype.itemsize)
        return rows

    def _expected(self, plan: TensorPlan) -> ExpectedWeight:
        from .refining.weights import ExpectedWeight

        shape = plan.source.shape
        expert = 0 if len(shape) > 2 else None
        return ExpectedWeight(self._reads(plan), shape[-1], *_clusters(plan), expert)

    def _reads(self, plan: TensorPlan) -> str:
        """The name under which the statistics know a weight."""
        # a tied embedding is the head too: what the head reads says which of its columns matter
        head = plan.role is Role.EMBEDDING and self._tied_head
        return HEAD if head else plan.source.name

    def _by_input(self, tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
        """Weights that read one input one after the other, so that they share its factorization."""
        places: dict[str, int] = {}

        def place(plan: TensorPlan) -> int:
            name = plan.source.name
            source = self._statistics.input_of(name) if self._statistics else None
            return places.setdefault(source or name, len(places))

        return sorted(tensors, key=place)

    def _convert_tensor(self, plan: TensorPlan) -> None:
        try:
            if plan.encoding is not None:
                self._write_linear(plan)
            elif plan.quantized:
                self._write_float_split(plan)
            else:
                self._write_float(plan)
        except OverflowError as error:
            layout = "--layout float " if plan.quantized else ""
            raise CheckpointError(
                plan.source.name, str(error), f"convert with {layout}--outtype bf16 or f32"
            ) from error
        self._finish(plan)

    def _finish(self, plan: TensorPlan) -> None:
        if self._complete is not None:
            error = self.relative_errors.get(plan.source.name)
            self._complete(plan.source.name, [o.name for o in plan.outputs], error)

    def _write_float(self, plan: TensorPlan) -> None:
        """Copy, in the plan's float type."""
        qtype = plan.outputs[0].qtype
        as_it_is = plan.source.dtype.name == qtype.name
        for first_row, raw in row_slabs(plan.source):
            check_finite(plan.source, first_row, raw)
            data = raw if as_it_is else _as_float(to_float32(raw, plan.source.dtype), qtype)
            self._write_slab(plan, first_row, [data])
            self._advance(plan, raw.nbytes)

    def _write_float_split(self, plan: TensorPlan) -> None:
        """Value split without quantization: the sub-layers as F32."""
        split = fit_value_split(plan.source, ValueHistogram.of(plan.source), len(plan.outputs))
        for first_row, raw in row_slabs(plan.source):
            layers = float_sub_layers(to_float32(raw, plan.source.dtype), split)
            nothing = np.full(raw.shape, -0.0, np.float32)
            self._write_slab(plan, first_row, layers + [nothing] * (len(plan.outputs) - split.k))
            self._advance(plan, raw.nbytes)
        self._record_error(plan, 0.0)

    def _write_linear(self, plan: TensorPlan) -> None:
        """Value split with linear quantization."""
        if plan.encoding is None:
            raise AssertionError(plan.source.name)
        histogram = ValueHistogram.of(plan.source)
        split = fit_value_split(plan.source, histogram, len(plan.outputs))
        packer = SubLayerPacker(split, plan.source.dtype, plan.encoding, self._plan.recipe.granularity)
        columns = plan.source.shape[-1]
        for first_row, raw in row_slabs(plan.source):
            packed = packer.pack(raw.reshape(-1, columns))
            # a weight with fewer distinct values than clusters: all-zero bytes decode to zeros
            empty = np.zeros_like(packed[0])
            self._write_slab(plan, first_row, packed + [empty] * (len(plan.outputs) - split.k))
            self._advance(plan, raw.nbytes)
        power = float(np.sum(histogram.counts * histogram.values**2))
        error = packer.squared_error(histogram)
        self._record_error(plan, error / power if power else 0.0)

    def _write_slab(self, plan: TensorPlan, first_row: int, slabs: list[NDArray[Any]]) -> None:
        for output, slab in zip(plan.sub_layers, slabs, strict=True):
            row_bytes = output.nbytes // output.shape[0]
            self._sink.write(output.name, first_row * row_bytes, np.ascontiguousarray(slab).data)

    def _record_error(self, plan: TensorPlan, error: float) -> None:
        with self._lock:
            self.relative_errors[plan.source.name] = error

    def _advance(self, plan: TensorPlan, nbytes: int) -> None:
        if self._stop.is_set():
            raise _StoppedError
        with self._lock:
            self._progress.advance(nbytes, plan.source.name)


def _as_float(values: NDArray[np.float32], qtype: GGMLQuantizationType) -> NDArray[Any]:
    """Values in a float type of the file. Raises OverflowError where F16 would make them infinite."""
    with np.errstate(over="ignore"):
        data: NDArray[Any] = quants.quantize(values, qtype)
    if qtype is GGMLQuantizationType.F16 and not np.isfinite(data).all():
        largest = float(np.abs(values).max())
        raise OverflowError(f"holds values up to {largest:.4g}, beyond f16's largest, 65504")
    return data


def _clusters(
    plan: TensorPlan,
) -> tuple[list[tuple[GGMLQuantizationType, int]], NDArray[np.int64] | None]:
    """Type and width of a weight's clusters, and its channel order."""
    pieces = [(o.qtype, o.shape[-1]) for o in plan.sub_layers]
    return pieces, plan.order.channels if plan.order else None


class _StoppedError(Exception):
    """Another tensor failed; this one's result is not wanted any more."""
