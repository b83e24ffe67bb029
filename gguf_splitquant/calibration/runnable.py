"""A float model that llama.cpp can run, without a second copy of it on the disk.

llama.cpp opens GGUF files and nothing else. A checkpoint in another format becomes a *frame*: a GGUF file
with the model's header, its vectors and other F32 tensors, and holes where the matrices would be. It takes a
few megabytes of disk, however large it looks. Before llama.cpp computes with a matrix it is told where that
is in truth (:mod:`.lent_weights`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gguf import GGMLQuantizationType

from ..conversion import Conversion
from ..gguf_io.layout import FileLayout
from ..gguf_io.metadata import file_metadata
from ..gguf_io.shards import layout_model
from ..gguf_io.writer import PartialFile
from ..planning.plan import OutputTensor, Plan, TensorPlan, make_plan, stored_as_f32
from ..recipe import Recipe
from ..sources.model import SourceModel, SourceTensor
from .lent_weights import stored_rows

_FRAME = "frame.gguf"


@dataclass(frozen=True)
class Runnable:
    """A model as llama.cpp opens it.

    Attributes:
        path: a GGUF file.
        elsewhere: the tensors that the file has only room for, by name.
        copies: bytes of memory for those that llama.cpp cannot use where they are; the others of them are
            read again whenever they are needed.
    """

    path: Path
    elsewhere: Mapping[str, SourceTensor] = field(default_factory=dict)
    copies: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the model; 0 if the file is missing, which the engine reports."""
        return self.path.stat().st_size if self.path.is_file() else 0


@contextmanager
def runnable(
    model: SourceModel | Path, folder: Path, copies: int = 0, threads: int | None = None
) -> Iterator[Runnable]:
    """A model to run for a while.

    Args:
        model: a GGUF file, run as it is; or a checkpoint, whose matrices llama.cpp reads where they are, in
            their own type.
        folder: exists; takes the frame.
        copies: see :class:`Runnable`; at most, as they need no more. Results do not depend on it.
        threads: None is all cores.

    Raises:
        OutputError: the folder cannot hold the frame.
        CheckpointError: NaN or Inf in a tensor that the frame holds.
    """
    if isinstance(model, Path):
        yield Runnable(model)
        return
    if model.float_file is not None:
        yield Runnable(model.float_file)
        return
    path = folder / _FRAME
    for left in folder.glob(f"{_FRAME}*"):  # by a run that was killed
        left.unlink()
    try:
        elsewhere = _write_frame(model, path, threads or os.cpu_count() or 1)
        wanted = sum(t.nbytes for t in elsewhere.values() if stored_rows(t) is None)
        yield Runnable(path, elsewhere, min(copies, wanted))
    finally:
        path.unlink(missing_ok=True)


def _write_frame(model: SourceModel, path: Path, threads: int) -> dict[str, SourceTensor]:
    plan = _plan(model)
    weights = [t.outputs for t in plan.tensors]
    (layout,) = layout_model(model.architecture, partial(file_metadata, model, plan, {}, ""), weights).files
    inside = [t for t in plan.tensors if stored_as_f32(t.source)]
    file = PartialFile(path, layout.total_bytes)
    file.create()
    try:
        file.write_at(0, layout.header)
        Conversion(plan, _Frame(file, layout), None, model.tied_head).run(inside, threads)
        file.commit()
    except BaseException:
        file.discard()
        raise
    return {t.source.name: t.source for t in plan.tensors if not stored_as_f32(t.source)}


def _plan(model: SourceModel) -> Plan:
    """Every matrix in its own type: llama.cpp computes with the checkpoint's own bytes."""
    plan = make_plan(model, Recipe(layout="float"))

    def own(tensor: TensorPlan) -> TensorPlan:
        if stored_as_f32(tensor.source):
            return tensor
        qtype = GGMLQuantizationType[tensor.source.dtype.value]
        return replace(tensor, outputs=(OutputTensor(tensor.source.name, qtype, tensor.source.shape),))

    return replace(plan, tensors=tuple(own(t) for t in plan.tensors))


@dataclass(frozen=True)
class _Frame:
    """Takes what the frame holds (:class:`~..conversion.TensorSink`)."""

    file: PartialFile
    layout: FileLayout

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        self.file.write_at(self.layout.offsets[tensor] + position, data)
