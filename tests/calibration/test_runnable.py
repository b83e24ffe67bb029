"""A checkpoint runs in llama.cpp as the file that would hold all of it does, and without that file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from gguf_splitquant.calibration import lent_weights
from gguf_splitquant.calibration.calibrate import gather
from gguf_splitquant.calibration.lent_weights import stored_rows
from gguf_splitquant.calibration.moments import Moments, TokenWeighting
from gguf_splitquant.calibration.observer import ObservedEngine
from gguf_splitquant.calibration.runnable import Runnable, runnable
from gguf_splitquant.calibration.sensitivity import Probing, measure_sensitivity, row_scales
from gguf_splitquant.errors import CheckpointError
from gguf_splitquant.runtime.engine import EngineOptions
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import FloatType, SourceModel
from scripts.mixture import write_mixture

pytestmark = pytest.mark.engine

TEXT = np.arange(3, 51, dtype=np.int32).reshape(2, 24)
ROOM = pytest.mark.parametrize("room", [0, 1 << 40], ids=["nothing is kept", "copies"])


@pytest.fixture
def files() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def filled(frame: Runnable, path: Path) -> Runnable:
    """The file that the frame stands for."""
    reader = GGUFReader(frame.path)
    writer = GGUFWriter(path, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            element = field.types[-1] if field.types[0] is GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], element)
    for tensor in reader.tensors:
        source = frame.elsewhere.get(tensor.name)
        if source is None:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        else:
            raw = source.read()
            data = raw.view(np.uint8) if source.dtype is FloatType.BF16 else raw
            writer.add_tensor(tensor.name, data, raw_dtype=GGMLQuantizationType[source.dtype.value])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Runnable(path)


def logits(model: Runnable) -> NDArray[np.float32]:
    """Of both texts, and of one token after them: the graph is another one."""
    options = EngineOptions(n_ctx=512, n_batch=48, n_ubatch=48, n_sequences=2, n_threads=1, repack=False)
    sequences, positions = np.divmod(np.arange(TEXT.size), TEXT.shape[1])
    with ObservedEngine(model, options) as engine:
        parts = [engine.decode(TEXT.reshape(-1), positions, sequences, True)]
        parts.append(engine.decode([7], TEXT.shape[1], 1, True))
        engine.clear()
        parts.append(engine.decode(TEXT.reshape(-1), positions, sequences, True))
    return np.concatenate(parts)


def measured(model: Runnable, folder: Path, text: NDArray[np.int32]) -> tuple[Moments, dict[str, float]]:
    folder.mkdir()
    moments = gather(model, text, folder, TokenWeighting(), {}, n_threads=1)
    rows = row_scales(model, moments.sharing.keys())
    probing = Probing(2, length=16, skip=4, layers=3)
    return moments, measure_sensitivity(model, text, rows, moments, probing, n_threads=1)


@ROOM
@pytest.mark.parametrize("experts", [False, True], ids=["dense", "experts"])
def test_statistics_are_the_same(
    stories15m: Path, tmp_path: Path, files: ExitStack, experts: bool, room: int
) -> None:
    if experts:
        write_mixture(stories15m, tmp_path / "mixture", 4, 2)
    model = open_model(tmp_path / "mixture" if experts else stories15m)
    frame = files.enter_context(runnable(model, tmp_path, room))
    want, want_sensitivity = measured(filled(frame, tmp_path / "full.gguf"), tmp_path / "full", TEXT)
    moments, sensitivity = measured(frame, tmp_path / "frame", TEXT)
    assert sensitivity == want_sensitivity
    assert moments.sharing == want.sharing
    for name in want.files:
        np.testing.assert_array_equal(moments.matrix(name), want.matrix(name))


def test_a_frame_takes_little_of_the_disk_and_goes(stories: SourceModel, tmp_path: Path) -> None:
    (tmp_path / "frame.gguf.0123.partial").write_bytes(b"of a run that was killed")
    with runnable(stories, tmp_path, copies=1 << 40) as frame:
        status = frame.path.stat()
        assert list(tmp_path.iterdir()) == [frame.path]
        values = sum(t.nbytes for t in stories.tensors)
        assert status.st_size < 0.2 * values and 512 * status.st_blocks < 2_000_000  # the vocabulary
        assert values < frame.nbytes < values + 1_000_000
        made = [t for t in frame.elsewhere.values() if stored_rows(t) is None]
        # queries and keys, whose rows are in another order
        assert len(made) == 2 * 6
        assert frame.copies == sum(t.nbytes for t in made) == 2 * 6 * 288 * 288 * 4
    assert list(tmp_path.iterdir()) == []


def test_pages_are_let_go_and_come_back(
    stories15m: Path, tmp_path: Path, files: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = files.enter_context(runnable(open_model(stories15m), tmp_path, copies=1 << 40))
    expected, let_go = logits(frame), lent_weights._let_go
    gone: list[int] = []

    def noted(address: int, nbytes: int) -> None:
        gone.append(nbytes)
        let_go(address, nbytes)

    monkeypatch.setattr(lent_weights, "_PAGES", 1 << 20)
    monkeypatch.setattr(lent_weights, "_let_go", noted)
    np.testing.assert_array_equal(logits(frame), expected)
    own = sum(t.nbytes for t in frame.elsewhere.values() if stored_rows(t) is not None)
    assert sum(gone) > 2 * own  # at each of three passes, but for what came last


def test_a_file_is_run_as_it_is(tmp_path: Path) -> None:
    with runnable(tmp_path / "model.gguf", tmp_path / "no such folder") as model:
        assert model == Runnable(tmp_path / "model.gguf")


def test_a_weight_that_cannot_be_read_is_an_error_of_the_checkpoint(
    stories15m: Path, tmp_path: Path, files: ExitStack
) -> None:
    folder = shutil.copytree(stories15m, tmp_path / "model")
    frame = files.enter_context(runnable(open_model(folder), tmp_path))
    made = {n: t for n, t in frame.elsewhere.items() if stored_rows(t) is None}
    weights = folder / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 100)
    with ObservedEngine(Runnable(frame.path, made), EngineOptions(n_ctx=256)) as engine:
        with pytest.raises(CheckpointError, match=r"model\.safetensors: ends \d+ bytes early"):
            engine.decode([5], 0, 0, True)
        engine.clear()
        with pytest.raises(CheckpointError):  # no result is left over from the failure
            engine.decode([5], 0, 0, True)
