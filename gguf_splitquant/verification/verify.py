"""Make tensors of a file again from their source, and compare every byte.

The file says what is needed: the recipe, each weight's types and widths, and a digest of the statistics. So
nothing is planned again; only the weights that are looked at are read and quantized.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .. import __version__
from ..conversion import Conversion
from ..errors import VerificationError
from ..file_plan import calibration_of, plan_file
from ..gguf_io.header import GGUFHeader, TensorEntry
from ..gguf_io.metadata import KEY_RELATIVE_ERROR, errors_in
from ..planning.curves import InputStatistics
from ..planning.plan import OutputTensor, Plan, make_plan
from ..planning.refined import RefinedPlan
from ..progress import SILENT, Progress
from ..sources.model import SourceModel
from .comparing import Comparing, Difference, sample_of
from .headers import header_differences
from .stored import StoredRecipe


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        checked: weights that were made again, under their standard names.
        of: how many the model has.
        compared_bytes: bytes of tensors that were compared.
        seed: of the sample; None: all were compared.
        differences: empty if all that was looked at is right.
        notes: what a reader should know, as sentences.
    """

    checked: tuple[str, ...]
    of: int
    compared_bytes: int
    seed: int | None
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def matches(self) -> bool:
        """Nothing differs."""
        return not self.differences


def verify(
    stored: StoredRecipe,
    model: SourceModel,
    *,
    statistics: InputStatistics | None = None,
    tensors: int | None = 0,
    seed: int | None = None,
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Compare a file with what its recipe makes of ``model``.

    Metadata, the list of tensors, the channel orders and the padding are compared as a whole; of the weights
    a sample.

    Args:
        stored: the file (:func:`.stored.read_recipe`).
        model: the source that it is said to be made from.
        statistics: of layer inputs, where the recipe uses any.
        tensors: so many weights at least, one of every kind of layer always among them; None: all of them,
            and the plan too.
        seed: of the sample; None: another one each time.
        threads: None is all cores.
        progress: told of every slab.

    Raises:
        VerificationError: the statistics are missing, or others than those of the file.
        CheckpointError: the source cannot be read.
    """
    path = stored.header.path
    notes = _version_note(stored)
    if stored.calibration and statistics is None:
        raise VerificationError(path, "was made with statistics of layer inputs", "give the same ones")
    refined = stored.refined_plan(model, statistics)
    plan = make_plan(model, stored.recipe, refined)
    calibration = calibration_of(plan, statistics)
    if stored.calibration and calibration != stored.calibration:
        raise VerificationError(
            path,
            f"was made with other statistics of layer inputs ({stored.calibration[:19]}...) "
            f"than those at hand ({calibration[:19]}...)",
            "give the same ones, or verify with the version and on the kind of processor that made it",
        )
    if calibration and not stored.calibration:
        notes.append("the file does not record its statistics: if they were others, weights differ")
    if refined is not None:
        notes += _target_notes(stored, plan, refined)
    differences = _list_differences(plan.outputs, stored.header.tensors)
    differences += header_differences(model, plan, stored, notes)
    if tensors is None:
        seed = None
    elif seed is None:
        seed = secrets.randbelow(1 << 32)
    chosen = sample_of(plan.tensors, tensors, seed or 0)
    if tensors is None and stored.recipe.refined and not stored.recipe.qtype:
        _, _, planned = plan_file(model, stored.recipe, statistics=statistics, progress=progress)
        if planned is not None and refined is not None and dict(planned.pieces) != dict(refined.pieces):
            notes.append(
                "the types are not those that this version plans: "
                "they come from a plan file, or from another version"
            )
    sink = Comparing(stored.header.tensors)
    for item in plan.tensors:
        if item.order is not None and len(item.outputs) > len(item.sub_layers):
            sink.write(item.order.name, 0, item.order.stored.data)
    wrong = {d.subject for d in differences}
    whole = [t for t in chosen if not any(o.name in wrong for o in t.outputs)]
    work = Conversion(plan, sink, statistics, model.tied_head, progress)
    work.run(whole, threads or os.cpu_count() or 1)
    differences += [
        Difference(entry.name, f"{wrong:,} of {entry.nbytes:,} bytes differ") for entry, wrong in sink.wrong()
    ]
    differences += _error_differences(work.relative_errors, stored.header)
    checked = tuple(t.source.name for t in whole)
    return Verification(checked, len(plan.tensors), sink.compared, seed, tuple(differences), tuple(notes))


def _list_differences(wanted: Sequence[OutputTensor], found: Sequence[TensorEntry]) -> list[Difference]:
    """Tensors that are missing, too many, of another type or shape, or in another order."""
    entries = {entry.name: entry for entry in found}
    outputs = {output.name: output for output in wanted}
    differences = [Difference(name, "is not in the file") for name in outputs if name not in entries]
    differences += [Difference(name, "is in the file only") for name in entries if name not in outputs]
    for name, output in outputs.items():
        entry = entries.get(name)
        if entry is not None and (entry.qtype, entry.shape) != (output.qtype, output.shape):
            right = f"{output.qtype.name} {list(output.shape)}"
            differences.append(
                Difference(name, f"is {entry.qtype.name} {list(entry.shape)} in the file, not {right}")
            )
    if not differences and list(entries) != list(outputs):
        name = next(n for n, m in zip(entries, outputs, strict=True) if n != m)
        differences.append(Difference(name, "stands at another place in the list of tensors"))
    return differences


def _error_differences(errors: Mapping[str, float], header: GGUFHeader) -> list[Difference]:
    """Recorded errors of the weights that were made again: each file has those of its own weights."""
    recorded: dict[str, float] = {}
    for metadata in (header.metadata, *header.further_metadata):
        recorded |= errors_in(metadata)
    return [
        Difference(f"metadata {KEY_RELATIVE_ERROR}", f"is {recorded[name]:.6g} for {name}, not {error:.6g}")
        for name, error in errors.items()
        if name in recorded and np.float32(recorded[name]) != np.float32(error)
    ]


def _target_notes(stored: StoredRecipe, plan: Plan, refined: RefinedPlan) -> list[str]:
    """The planner keeps below a target, so a file beyond it has other types than planned ones.

    Of a file below it nothing is known without planning.
    """
    recipe = stored.recipe
    beyond = ""
    if recipe.target_size is not None and stored.header.file_bytes > recipe.target_size:
        beyond = f"{stored.header.file_bytes:,} bytes, and its recipe asks for {recipe.target_size:,}"
    linear = [t for t in plan.tensors if t.source.name in refined.pieces]
    weights = sum(t.source.n_params for t in linear)
    bits = 8 * sum(o.nbytes for t in linear for o in t.sub_layers)
    # a sum of floats may miss the target by its last digits
    if recipe.target_bpw is not None and bits > recipe.target_bpw * weights * (1 + 1e-9):
        beyond = f"{bits / weights:.4f} bits per weight, and its recipe asks for {recipe.target_bpw:g}"
    if not beyond:
        return []
    return [f"the file has {beyond}: its types come from a plan file, or its recipe was changed"]


def _version_note(stored: StoredRecipe) -> list[str]:
    mine = f"gguf-splitquant {__version__}"
    if stored.made_by and stored.made_by != mine:
        return [f"made by {stored.made_by}, verified with {mine}: what differs may be the version"]
    return []
