"""One model in one or several files: which tensor goes where, and writing them so that all appear together.

llama.cpp reads shards that ``llama-gguf-split`` writes: every one says its number, the count and the number
of tensors in all, the first one has the model's metadata, and the names follow a pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from gguf import GGUFValue, GGUFValueType, Keys

from ..errors import OutputError
from ..planning.plan import OutputTensor
from .header import shard_path
from .layout import FileLayout, build_layout
from .writer import PartialFile, check_target

_MAX_SHARDS = 65535
_TENSOR_INFO = 64
"""Bytes of a tensor's entry in the header beside its name, at most; padding included."""


@dataclass(frozen=True)
class ModelLayout:
    """Byte positions in all files of one model.

    Attributes:
        files: at least one, in order.
        outputs: the tensors of each.
    """

    files: tuple[FileLayout, ...]
    outputs: tuple[tuple[OutputTensor, ...], ...]

    @property
    def total_bytes(self) -> int:
        """Size of all files."""
        return sum(file.total_bytes for file in self.files)

    def paths(self, out: Path) -> tuple[Path, ...]:
        """The names of the files: ``out`` itself, or ``out-00001-of-00003.gguf`` and so on."""
        count = len(self.files)
        if count == 1:
            return (out,)
        prefix = out.with_name(out.name.removesuffix(".gguf"))
        return tuple(shard_path(prefix, number, count) for number in range(count))


def layout_model(
    architecture: str,
    metadata: Mapping[str, GGUFValue],
    outputs: Sequence[OutputTensor],
    max_shard_bytes: int | None = None,
) -> ModelLayout:
    """Lay out a model.

    Args:
        architecture: ``general.architecture``.
        metadata: all key-value pairs, in file order.
        outputs: all tensors, in file order; names are unique.
        max_shard_bytes: size that no file exceeds, unless one tensor alone does; None: one file.

    Raises:
        OutputError: the system's temporary folder has no room for the header, or there are too many shards.
    """
    whole = build_layout(architecture, metadata, outputs)
    if max_shard_bytes is None or whole.total_bytes <= max_shard_bytes:
        return ModelLayout((whole,), (tuple(outputs),))
    groups = _grouped(outputs, len(build_layout(architecture, metadata, ()).header), max_shard_bytes)
    if len(groups) > _MAX_SHARDS:
        raise OutputError("--max-shard-size", f"gives {len(groups):,} files", "choose a larger one")
    if len(groups) == 1:
        return ModelLayout((whole,), (tuple(outputs),))
    files = []
    for number, group in enumerate(groups):
        pairs = _shard_pairs(number, len(groups), len(outputs))
        files.append(build_layout(architecture, {**metadata, **pairs} if number == 0 else pairs, group))
    return ModelLayout(tuple(files), tuple(groups))


def _grouped(outputs: Sequence[OutputTensor], first_header: int, most: int) -> list[tuple[OutputTensor, ...]]:
    """Consecutive tensors, as many as fit."""
    groups: list[list[OutputTensor]] = [[]]
    size = first_header + 3 * _TENSOR_INFO  # the three keys of a shard
    for tensor in outputs:
        room = tensor.nbytes + len(tensor.name.encode()) + 2 * _TENSOR_INFO
        if groups[-1] and size + room > most:
            groups.append([])
            size = 4 * _TENSOR_INFO
        groups[-1].append(tensor)
        size += room
    return [tuple(group) for group in groups]


def _shard_pairs(number: int, count: int, n_tensors: int) -> dict[str, GGUFValue]:
    return {
        Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(n_tensors, GGUFValueType.INT32),
    }


class PartialModel:
    """The files of a model, written at any positions by any threads, then renamed into place together.

    Use as a context manager: leaving it without :meth:`commit` removes all.

    Args:
        out: the file; of several the name before the number.
        layout: where everything lies.
        force: replace existing files.

    Raises:
        OutputError: a file exists (without ``force``), its folder is missing or read-only, or the disk is too
            small for all of them.
    """

    def __init__(self, out: Path, layout: ModelLayout, *, force: bool = False) -> None:
        self.paths = layout.paths(out)
        self._layout = layout
        self._place = {
            tensor.name: (number, layout.files[number].offsets[tensor.name])
            for number, group in enumerate(layout.outputs)
            for tensor in group
        }
        check_target(self.paths[0], layout.total_bytes, force=force)
        self._open = ExitStack()
        self._files = []
        with self._open:
            for path, file in zip(self.paths, layout.files, strict=True):
                partial = PartialFile(path, file.total_bytes, force=force)
                self._files.append(self._open.enter_context(partial))
            self._open = self._open.pop_all()

    def __enter__(self) -> PartialModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.close()

    def write(self, tensor: str, position: int, data: bytes | memoryview) -> None:
        """Write ``position`` bytes into a tensor. Thread-safe. Raises OutputError when the disk refuses."""
        number, offset = self._place[tensor]
        self._files[number].write_at(offset + position, data)

    def commit(self, metadata: Mapping[str, GGUFValue], architecture: str) -> None:
        """Everything is written: the headers with the final metadata, then the names, the first one last."""
        for number, (file, layout) in enumerate(zip(self._files, self._layout.files, strict=True)):
            header = layout.header
            if number == 0:
                count, n_tensors = len(self._files), sum(map(len, self._layout.outputs))
                pairs = _shard_pairs(0, count, n_tensors) if count > 1 else {}
                header = build_layout(architecture, {**metadata, **pairs}, self._layout.outputs[0]).header
            if len(header) != len(layout.header):
                raise AssertionError(f"the header grew from {len(layout.header)} to {len(header)} bytes")
            file.write_at(0, header)
        for file in reversed(self._files):
            file.commit()
