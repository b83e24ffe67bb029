"""From a complete text to second moments: of every input the matrix is there, or the rows to make it of.

Matrices are made one after the other, so that memory does not grow with the number of layers, and each takes
the place of its rows on the disk. A run that is killed meanwhile is gone on with at the input where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from ..errors import SplitQuantError
from ..linear_algebra import blas_threads
from ..lookahead import one_ahead
from ..progress import SILENT, Progress
from ..runtime.threads import default_threads
from .input_sum import InputSum, add_rows
from .moments import FORMAT, INDEX, Moments, TokenWeighting

F32 = NDArray[np.float32]

_RECORDS, _SHARING = "gathered", "sharing.json"


def keep_gathered(folder: Path, inputs: Iterable[InputSum], sharing: Mapping[str, str]) -> None:
    """Note in a folder what of each input is there. Raises OSError if there is no room."""
    partial = folder / f"{_RECORDS}.partial"
    partial.mkdir()
    for total in inputs:
        total.save(partial / f"{total.path.stem}.npz")
    (partial / _SHARING).write_text(json.dumps(dict(sharing)))
    partial.rename(folder / _RECORDS)


def is_gathered(folder: Path) -> bool:
    """The text is complete: :func:`complete_moments` is what is left."""
    return (folder / _RECORDS).is_dir()


def forget_gathered(folder: Path) -> None:
    """Remove the notes of :func:`keep_gathered`; the moments are complete."""
    shutil.rmtree(folder / _RECORDS)


def complete_moments(
    folder: Path,
    weighting: TokenWeighting,
    about: Mapping[str, Any],
    threads: int | None = None,
    progress: Progress = SILENT,
) -> Moments:
    """Make the matrices that are not there yet, write the index, open the result.

    Args:
        folder: that :func:`is_gathered`.
        weighting: what each token counts.
        about: how the statistics were made.
        threads: None: one per performance core. The result does not depend on them.
        progress: counts rows.

    Raises:
        OSError: the folder has no room.
        SplitQuantError: it is damaged.
    """
    records = folder / _RECORDS
    try:
        inputs = [InputSum.load(record, folder) for record in sorted(records.glob("*[0-9].npz"))]
        sharing = json.loads((records / _SHARING).read_text())
    except (OSError, ValueError, KeyError, BadZipFile) as error:
        raise SplitQuantError(records, f"cannot be read: {error}", f"delete {folder}") from error
    _add_stored([total for total in inputs if total.stored], records, weighting, threads, progress)
    energy: dict[str, Any] = {total.name: total.energy / total.tokens for total in inputs}
    np.savez(folder / "energy.npz", **energy)
    index = {
        "format": FORMAT,
        "files": {total.name: total.path.name for total in inputs},
        "tokens": {total.name: total.tokens for total in inputs},
        "experts": {total.name: total.stack.counts.tolist() for total in inputs if total.stack is not None},
        "sharing": sharing,
        "about": dict(about),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=1))
    for left in folder.glob("*.waiting"):  # of an input that was complete when the run was killed
        left.unlink()
    return Moments.open(folder)


def _add_stored(
    totals: Sequence[InputSum],
    records: Path,
    weighting: TokenWeighting,
    threads: int | None,
    progress: Progress,
) -> None:
    """One input after the other: its matrix, while that of the one before is written."""
    if not totals:
        return

    def write(total: InputSum, matrix: F32) -> None:
        total.write(matrix)
        total.save(records / f"{total.path.stem}.npz")
        total.rows_path.unlink()

    progress.start("adding up statistics", sum(total.stored for total in totals), "rows")
    writing: Future[None] | None = None
    with (
        blas_threads(1),
        ThreadPoolExecutor(threads or default_threads()) as pool,
        ThreadPoolExecutor(1) as disk,
    ):
        for total in totals:
            matrix = np.zeros((total.channels, total.channels), np.float32)
            counted = (total.count(rows, weighting) for rows in total.stored_rows())
            with closing(one_ahead(counted)) as ahead:
                for rows in ahead:
                    add_rows([(matrix, rows)], pool)
                    progress.advance(len(rows), total.name)
            if writing is not None:
                writing.result()
            writing = disk.submit(write, total, matrix)
            del matrix
        if writing is not None:
            writing.result()
    progress.finish()
