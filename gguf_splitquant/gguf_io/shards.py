"""One model in one or several files: which tensor goes where, and writing them so that all appear together.

llama.cpp reads shards that ``llama-gguf-split`` writes: every one says its number, the count and the number
of tensors in all, the first one has the model's metadata, and the names follow a pattern. What a shard holds
depends on the plan and on its own tensors alone, so that each can be written on a machine of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGUFValue, GGUFValueType, Keys

from ..planning.plan import OutputTensor
from .layout import FileLayout, build_layout
from .sharding import WHOLE, Shards, shard_groups, shard_of

MetadataOf = Callable[[int, Collection[str]], Mapping[str, GGUFValue]]
"""Key-value pairs of the file of a number (from 0) with those tensors."""


@dataclass(frozen=True)
class ModelLayout:
    """Byte positions in all files of one model.

    Attributes:
        files: at least one, in order.
        outputs: the tensors of each.
        only: number (from 0) of the one file that is written; None: all are.
    """

    files: tuple[FileLayout, ...]
    outputs: tuple[tuple[OutputTensor, ...], ...]
    only: int | None = None

    @property
    def written(self) -> Sequence[int]:
        """Numbers (from 0) of the files that are written."""
        return range(len(self.files)) if self.only is None else (self.only,)

    @property
    def total_bytes(self) -> int:
        """Size of the files that are written."""
        return sum(self.files[number].total_bytes for number in self.written)

    @property
    def whole_bytes(self) -> int:
        """Size of all files, whoever writes them."""
        return sum(file.total_bytes for file in self.files)

    def place_of(self, tensor: str) -> tuple[int, int] | None:
        """File and position of a tensor that is written; None if it is in another file."""
        for number in self.written:
            offset = self.files[number].offsets.get(tensor)
            if offset is not None:
                return number, offset
        return None

    def holds(self, outputs: Iterable[OutputTensor]) -> bool:
        """Whether any of a weight's tensors is in a file that is written."""
        return any(self.place_of(output.name) for output in outputs)

    def paths(self, out: Path) -> tuple[Path, ...]:
        """The names of what is written: ``out`` itself, or ``out-00001-of-00003.gguf`` and so on."""
        count = len(self.files)
        return (out,) if count == 1 else tuple(shard_of(out, number, count) for number in self.written)

    def headers(self, architecture: str, metadata_of: MetadataOf) -> dict[int, bytes]:
        """The headers of the files that are written, with other values of the same sizes."""
        headers = {}
        for number in self.written:
            file = _build(architecture, metadata_of, self.outputs, number)
            if len(file.header) != len(self.files[number].header):
                grown = f"from {len(self.files[number].header)} to {len(file.header)}"
                raise AssertionError(f"the header of file {number} grew {grown} bytes")
            headers[number] = file.header
        return headers


def layout_model(
    architecture: str,
    metadata_of: MetadataOf,
    weights: Iterable[Sequence[OutputTensor]],
    shards: Shards = WHOLE,
) -> ModelLayout:
    """Lay out a model.

    Args:
        architecture: ``general.architecture``.
        metadata_of: all key-value pairs of a file, in file order.
        weights: the tensors that each weight becomes, in file order; names are unique.
        shards: how many files, and which are written.

    Raises:
        OutputError: the system's temporary folder has no room for the header, there are too many shards, or
            not the one that is asked for.
    """
    weights = [tuple(outputs) for outputs in weights]
    everything = tuple(output for outputs in weights for output in outputs)
    whole = _build(architecture, metadata_of, (everything,), 0)
    groups: Sequence[tuple[OutputTensor, ...]] = (everything,)
    if shards.count is not None or (shards.most_bytes or whole.total_bytes) < whole.total_bytes:
        pairs = metadata_of(0, {output.name for output in everything})
        groups = shard_groups(weights, len(build_layout(architecture, pairs, ()).header), shards)
    shards.check(len(groups))
    only = None if shards.only is None or len(groups) == 1 else shards.only[0] - 1
    if len(groups) == 1:
        return ModelLayout((whole,), (everything,))
    numbers = range(len(groups))
    files = tuple(_build(architecture, metadata_of, groups, number) for number in numbers)
    return ModelLayout(files, tuple(groups), only)


def _build(
    architecture: str, metadata_of: MetadataOf, groups: Sequence[Sequence[OutputTensor]], number: int
) -> FileLayout:
    pairs = dict(metadata_of(number, {output.name for output in groups[number]}))
    if len(groups) > 1:
        pairs |= shard_pairs(number, len(groups), sum(map(len, groups)))
    return build_layout(architecture, pairs, groups[number])


def shard_pairs(number: int, count: int, n_tensors: int) -> dict[str, GGUFValue]:
    """What shard ``number`` (from 0) says of itself as such."""
    return {
        Keys.Split.LLM_KV_SPLIT_NO: GGUFValue(number, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_COUNT: GGUFValue(count, GGUFValueType.UINT16),
        Keys.Split.LLM_KV_SPLIT_TENSORS_COUNT: GGUFValue(n_tensors, GGUFValueType.INT32),
    }
