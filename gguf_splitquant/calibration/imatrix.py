"""llama.cpp's importance matrices: mean squares of layer inputs, in both of its file formats.

Read for users who have one, written so that llama-quantize and others can use what calibration found. GGUF
format: per weight ``NAME.in_sum2`` (sums of squares) and ``NAME.counts``; legacy format: a count of entries,
then name, calls and values of each (llama.cpp, tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
from numpy.typing import NDArray

from ..bounded import open_regular
from ..errors import GGUFError
from ..gguf_io.header import TensorEntry, read_header
from ..planning.curves import ExpertUse, Salience
from ..refining.metric import Feedback
from ..replacing import replacing
from ..sources.model import SourceModel, SourceTensor
from .moments import Moments
from .names import HEAD

F32 = NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_MAX_NAME = 1024
_CHUNK = 512
"""Tokens per chunk that the written file claims: llama-imatrix's default."""


@dataclass(frozen=True)
class ImportanceMatrix:
    """An imatrix as statistics of layer inputs: the diagonal of the second moments, no sensitivities.

    Attributes:
        importance: mean square of every input channel, by weight: (channels,), or (experts, channels).
        counts: tokens behind the mean of each expert, (experts,), by stack; the older format does not tell.
        sensitivity: empty.
    """

    importance: Mapping[str, F32]
    counts: Mapping[str, F32] = field(default_factory=dict)
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def input_of(self, weight: str) -> str | None:
        """The weight that stands for the input: weights with equal values read the same one."""
        if weight not in self.importance:
            return None
        return self._first[self.importance[weight].tobytes()]

    def matrix(self, weight: str, expert: int | None = None) -> F32:
        """Mean square of the channels, float32 (channels,).

        Of a stack, as ``expert`` sees them; without one the mean over all uses, which is what an expert gets
        that the text never reached. (llama-quantize gives that one the same importance for all channels.)
        """
        values = self.importance[weight]
        if values.ndim == 1:
            return values
        counts = self.counts.get(weight)
        if expert is not None and (counts is None or counts[expert] > 0):
            own: F32 = values[expert]
            return own
        if counts is None or not counts.any():
            counts = np.ones(len(values), np.float32)
        # no product of matrices: BLAS' sums depend on its threads
        pooled: F32 = np.average(values, axis=0, weights=counts).astype(np.float32)
        return pooled

    def salience(self, weight: str) -> Salience:
        """Channels do not interact as far as is known: feedback leaves all of them."""
        return Feedback.of(self.matrix(weight)).salience

    def experts(self, weight: str) -> ExpertUse | None:
        """How the text used a stack's experts; all alike where the file does not tell. None: no stack."""
        values = self.importance.get(weight)
        if values is None or values.ndim == 1:
            return None
        counts = self.counts.get(weight, np.ones(len(values), np.float32)).astype(np.float64)
        return ExpertUse(counts / max(counts.sum(), 1), tuple(np.flatnonzero(counts == 0).tolist()))

    @cached_property
    def _first(self) -> dict[bytes, str]:
        first: dict[bytes, str] = {}
        for name in self.importance:
            first.setdefault(self.importance[name].tobytes(), name)
        return first


def imatrix_for(model: SourceModel, path: Path) -> ImportanceMatrix:
    """The importance matrix of a model.

    Raises:
        GGUFError: not one, damaged, or of a model with other widths.
    """
    found = read_imatrix(path)
    shaped = dict(found.importance)
    for tensor in model.tensors:
        values = shaped.get(tensor.name)
        if values is not None:
            shaped[tensor.name] = _as_read_by(path, tensor, values)
    return ImportanceMatrix(shaped, found.counts)


def _as_read_by(path: Path, tensor: SourceTensor, values: F32) -> F32:
    """``values`` as the tensor reads them: the older format has all experts of a stack in one row."""
    experts, channels = tensor.shape[0] if len(tensor.shape) > 2 else 1, tensor.shape[-1]
    if experts > 1 and values.size == experts * channels:
        return values.reshape(experts, channels)
    if values.shape != (channels,):
        size = " x ".join(map(str, values.shape))
        cause = f"has {size} channels for {tensor.name}, which has {channels}"
        raise GGUFError(path, cause, "give the imatrix of this model")
    return values


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix. Experts that the text never reached count 1 in every channel.

    Raises:
        GGUFError: neither of the two formats, or damaged.
    """
    try:
        with open_regular(path) as file:
            magic = file.read(4)
            if magic != b"GGUF":
                file.seek(0)
                return ImportanceMatrix(_read_legacy(path, file))
    except OSError as error:
        raise GGUFError(path, f"cannot be read: {error}", "give the path of an imatrix file") from error
    return _read_gguf(path)


def _read_gguf(path: Path) -> ImportanceMatrix:
    header = read_header(path)
    entries = {t.name: t for t in header.tensors}
    importance: dict[str, F32] = {}
    tokens: dict[str, F32] = {}
    for name, entry in entries.items():
        if not name.endswith(_SUMS):
            continue
        weight = name.removesuffix(_SUMS)
        counted = entries.get(weight + _COUNTS)
        if counted is None:
            raise GGUFError(path, f"has sums but no counts for {weight}", "make the imatrix again")
        sums = _checked(path, weight, _values(entry)).reshape(-1, entry.shape[-1])
        counts = _checked(path, weight + _COUNTS, _values(counted)).reshape(-1, 1)
        if len(counts) not in (1, len(sums)):
            raise GGUFError(path, f"has {len(counts)} counts for {len(sums)} experts of {weight}")
        # what overflows here is refused as infinite
        with np.errstate(all="ignore"):
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1)).astype(np.float32)
        importance[weight] = _checked(path, weight, means[0] if len(means) == 1 else means)
        if len(means) > 1:
            tokens[weight] = np.broadcast_to(counts[:, 0], len(means))
    if not importance:
        raise GGUFError(path, "is a GGUF file, but not an imatrix", "give a file that llama-imatrix wrote")
    return ImportanceMatrix(importance, tokens)


def _values(entry: TensorEntry) -> F32:
    path = entry.file
    if entry.qtype is not gguf.GGMLQuantizationType.F32:
        raise GGUFError(path, f"{entry.name} is {entry.qtype.name}, not F32", "make the imatrix again")
    if not entry.nbytes:
        raise GGUFError(path, f"{entry.name} has no values", "make the imatrix again")
    with open_regular(path) as file:
        file.seek(entry.offset)
        values: F32 = np.frombuffer(file.read(entry.nbytes), dtype="<f4")
    return values


def _read_legacy(path: Path, file: BinaryIO) -> dict[str, F32]:
    size = path.stat().st_size

    def number(what: str, most: int) -> int:
        data = file.read(4)
        value = struct.unpack("<i", data)[0] if len(data) == 4 else -1
        if not 0 < value <= most:
            raise GGUFError(
                path, f"is not an imatrix, or is damaged: {what} is {value}", "give a file of llama-imatrix"
            )
        return int(value)

    importance: dict[str, F32] = {}
    for _ in range(number("the number of entries", size // 12)):
        name = file.read(number("the length of a name", _MAX_NAME)).decode("utf-8", "replace")
        calls = number("a number of calls", 2**31 - 1)
        count = number("a number of values", size // 4)
        data = file.read(4 * count)
        if len(data) < 4 * count:
            raise GGUFError(path, f"ends inside the values of {name}", "make the imatrix again")
        importance[name] = _checked(path, name, np.frombuffer(data, dtype="<f4") / np.float32(calls))
    return importance


def _checked(path: Path, name: str, values: NDArray[Any]) -> F32:
    if not np.isfinite(values).all() or (values < 0).any():
        raise GGUFError(path, f"has NaN, infinite or negative values for {name}", "make the imatrix again")
    return values.astype(np.float32, copy=False)


def write_moments(path: Path, moments: Moments) -> None:
    """Write what calibration found as an imatrix. Raises OutputError."""
    names = [n for n in moments.sharing if n.startswith("blk.") or n == HEAD]
    importance = {name: moments.energy(name) for name in names}
    tokens = {
        name: moments.uses.get(moments.sharing[name], moments.tokens[moments.sharing[name]]) for name in names
    }
    write_imatrix(path, importance, tokens, "a user's text" if moments.about.get("text") else "own text")


def write_imatrix(
    path: Path,
    importance: Mapping[str, NDArray[np.float64]],
    tokens: Mapping[str, int | Sequence[int]],
    source: str,
) -> None:
    """Write llama.cpp's GGUF format, which llama-quantize reads with ``--imatrix``.

    Args:
        path: is replaced if it exists.
        importance: mean square of every input channel by weight, (channels,) or (experts, channels).
        tokens: tokens behind each mean; of a stack, those that each expert multiplied.
        source: what the text was; stands in the file as its data set.

    Raises:
        OutputError: the file cannot be written.
    """
    with replacing(path) as partial:
        writer = gguf.GGUFWriter(partial, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", [source])
        most = max((int(np.max(count)) for count in tokens.values()), default=0)
        writer.add_uint32("imatrix.chunk_count", max(1, most // _CHUNK))
        writer.add_uint32("imatrix.chunk_size", _CHUNK)
        for name in sorted(importance):
            means = np.atleast_2d(importance[name])
            counts = np.broadcast_to(np.asarray(tokens[name], np.float64), len(means))[:, None]
            writer.add_tensor(name + _SUMS, (means * counts).astype(np.float32))
            writer.add_tensor(name + _COUNTS, counts.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
