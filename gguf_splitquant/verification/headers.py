"""What a file holds beside its weights, compared to the byte: metadata, the header's form, the padding.

A program that reads the file takes all of it, and what no program reads is a place to hide things in.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFValue, GGUFValueType, Keys

from ..gguf_io.header import TensorEntry
from ..gguf_io.layout import aligned, build_layout
from ..gguf_io.metadata import KEY_QUANTIZED_BY, KEY_RELATIVE_ERROR, file_metadata
from ..gguf_io.pairs import read_pairs
from ..gguf_io.shards import shard_pairs
from ..planning.plan import OutputTensor, Plan
from ..sources.model import SourceModel
from ..sources.reading import PositionedFile
from .comparing import Difference
from .stored import StoredRecipe

_OF_THE_HUB = Keys.General.SOURCE_REPO_URL
_MADE_BY = re.compile(r"gguf-splitquant [\w.+-]{1,60}", re.ASCII)


def header_differences(
    model: SourceModel, plan: Plan, stored: StoredRecipe, notes: list[str]
) -> list[Difference]:
    """Compare the metadata, the header and the padding of each file.

    Args:
        model: the source.
        plan: of the whole model.
        stored: the file, or the shards.
        notes: gets what cannot be compared.
    """
    header = stored.header
    differences = []
    for number, path in enumerate(header.shards):
        entries = [entry for entry in header.tensors if entry.file == path]
        several = len(header.shards) > 1
        names = {entry.name for entry in entries} if several else None
        metadata = file_metadata(model, plan, {}, stored.calibration, number, names)
        if several:
            metadata |= shard_pairs(number, len(header.shards), len(header.tensors))
        pairs = read_pairs(path) if number else stored.pairs
        found = _metadata_differences(model.architecture, metadata, pairs, [] if number else notes)
        if number:
            found = [Difference(f"{d.subject} of {path.name}", d.cause) for d in found]
        # only metadata that is right makes the header that it should
        if not found:
            found = _form_differences(model.architecture, pairs, entries, path)
        differences += [*found, *_padding_differences(entries, path)]
    return differences


def _metadata_differences(
    architecture: str,
    metadata: Mapping[str, GGUFValue],
    found: Mapping[str, GGUFValue],
    notes: list[str],
) -> list[Difference]:
    """Keys that are missing, too many, misplaced, or have another value; figures of errors: another form."""
    # written and read again: numbers are then what their type makes of them
    with tempfile.TemporaryDirectory(prefix="gguf-splitquant-") as folder:
        path = Path(folder) / "header.gguf"
        path.write_bytes(build_layout(architecture, metadata, ()).header)
        wanted = read_pairs(path)
    differences = []
    for key in dict.fromkeys([*wanted, *found]):
        if key not in wanted and key == _OF_THE_HUB and found[key].type is GGUFValueType.STRING:
            said = str(found[key].value)[:200]
            notes.append(f"{key} is {said!r}, which the source does not say: not verified")
        elif key not in wanted:
            differences.append(Difference(f"metadata {key}", "is in the file only"))
        elif key not in found:
            differences.append(Difference(f"metadata {key}", "is not in the file"))
        elif key == KEY_RELATIVE_ERROR:
            if _form(found[key]) != _form(wanted[key]):
                differences.append(Difference(f"metadata {key}", "does not have one figure for each weight"))
        elif wanted[key] != found[key] and not _other_version(key, found[key]):
            shown = (str(pair[key].value)[:60] for pair in (found, wanted))
            differences.append(Difference(f"metadata {key}", "is {!r} in the file, not {!r}".format(*shown)))
    if not differences:
        order = [key for key in found if key in wanted]
        moved = [key for key, right in zip(order, wanted, strict=True) if key != right]
        differences += [Difference(f"metadata {key}", "stands at another place") for key in moved[:1]]
    return differences


def _form(value: GGUFValue) -> tuple[GGUFValueType, GGUFValueType | None, int]:
    return value.type, value.sub_type, len(value.value) if isinstance(value.value, list) else -1


def _other_version(key: str, value: GGUFValue) -> bool:
    """Whether it names a version of this program: a note says which."""
    named = key == KEY_QUANTIZED_BY and value.type is GGUFValueType.STRING
    return named and _MADE_BY.fullmatch(str(value.value)) is not None


def _form_differences(
    architecture: str, pairs: Mapping[str, GGUFValue], entries: Sequence[TensorEntry], path: Path
) -> list[Difference]:
    """Headers that are not the bytes which this program writes for these pairs and tensors."""
    if not entries:
        return [Difference(path.name, "has no tensor")]
    outputs = [OutputTensor(entry.name, entry.qtype, entry.shape) for entry in entries]
    wanted = np.frombuffer(build_layout(architecture, pairs, outputs).header, np.uint8)
    if entries[0].offset != len(wanted):
        cause = f"its tensors begin at byte {entries[0].offset:,}, not {len(wanted):,}"
        return [Difference(path.name, cause)]
    found = np.empty_like(wanted)
    PositionedFile(path).read_into(found.data, 0)
    wrong = int(np.count_nonzero(found != wanted))
    return [Difference(path.name, f"{wrong:,} bytes of its header differ")] if wrong else []


def _padding_differences(entries: Sequence[TensorEntry], path: Path) -> list[Difference]:
    """Tensors that do not follow each other, and what stands between them and behind the last."""
    if not entries:
        return []
    file = PositionedFile(path)
    place, wrong = entries[0].offset, 0
    for entry in entries:
        if entry.offset != place:
            return [Difference(entry.name, f"begins at byte {entry.offset:,} of its file, not {place:,}")]
        end = entry.offset + entry.nbytes
        place = aligned(end)
        padding = bytearray(max(0, min(place, file.size) - end))
        file.read_into(memoryview(padding), end)
        wrong += len(padding) - padding.count(0)
    differences = []
    if wrong:
        differences.append(Difference(path.name, f"{wrong:,} bytes of padding between tensors are not zero"))
    if file.size > place:
        cause = f"has {file.size - place:,} bytes behind its last tensor"
        differences.append(Difference(path.name, cause))
    elif file.size < place:
        cause = f"ends {place - file.size:,} bytes early, in the padding of its last tensor"
        differences.append(Difference(path.name, cause))
    return differences
