"""A float model that llama.cpp can run, without a second copy of it on the disk.

llama.cpp opens GGUF files and nothing else. A checkpoint in another format becomes a *frame*: a GGUF file
with the model's header, its vectors and other F32 tensors, and holes where the matrices would be. It takes a
few megabytes of disk, however large it looks. Before llama.cpp computes with a matrix it is told what that
is in truth, and where (:mod:`.lent_weights`).

llama.cpp asks the system to load all of a file when it opens it, and Linux fills holes with pages of zeros.
So the matrices pretend to be of the smallest type that there is: then the holes are a tenth of the model.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

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
        elsewhere: the tensors that the file only pretends to have, by name.
        copies: bytes of memory for those that llama.cpp cannot use where they are; the others of them are
            read again whenever they are needed.
        pretended: bytes by which the file is smaller than the model.
    """

    path: Path
    elsewhere: Mapping[str, SourceTensor] = field(default_factory=dict)
    copies: int = 0
    pretended: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the model; 0 if the file is missing, which the engine reports."""
        return self.path.stat().st_size + self.pretended if self.path.is_file() else 0


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
        pretended = sum(t.nbytes - _hole(t) for t in elsewhere.values())
        yield Runnable(path, elsewhere, min(copies, wanted), pretended)
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
    """Vectors as they are, every matrix as something small."""
    plan = make_plan(model, Recipe(layout="float"))

    def small(tensor: TensorPlan) -> TensorPlan:
        source = tensor.source
        if stored_as_f32(source):
            return tensor
        return replace(tensor, outputs=(OutputTensor(source.name, _pretended(source), source.shape),))

    return replace(plan, tensors=tuple(small(t) for t in plan.tensors))


def _pretended(tensor: SourceTensor) -> GGMLQuantizationType:
    """The type of the fewest bits whose blocks fit the rows; else the tensor's own."""
    for qtype in (GGMLQuantizationType.IQ1_S, GGMLQuantizationType.Q4_0):
        if tensor.shape[-1] % GGML_QUANT_SIZES[qtype][0] == 0:
            return qtype
    return GGMLQuantizationType[tensor.dtype.value]


def _hole(tensor: SourceTensor) -> int:
    """Bytes that the frame has for a matrix."""
    values, nbytes = GGML_QUANT_SIZES[_pretended(tensor)]
    return tensor.n_params // int(values) * int(nbytes)


@dataclass(frozen=True)
class _Frame:
    """Takes what the frame holds (:class:`~..conversion.TensorSink`)."""

    file: PartialFile
    layout: FileLayout

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        self.file.write_at(self.layout.offsets[tensor] + position, data)
