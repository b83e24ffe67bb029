"""A model in several files: sizes, names and keys as llama.cpp wants them, all files or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import CheckpointError, OutputError
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.evaluation.results import recorded_errors
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.gguf_io.header import read_header
from gguf_splitquant.gguf_io.sharding import Shards
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.runtime.engine import Engine, EngineOptions
from gguf_splitquant.sources import open_model
from tests.gguf_files import FLOAT
from tests.gguf_io.test_file import broken
from tests.sample_models import small_model

MOST = 24_000
ERRORS = ("splitquant.quantized_tensors", "splitquant.relative_error")


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("out-*.gguf"))


@pytest.mark.parametrize("recipe", [RECIPES["paper"], Recipe(layout="float")])
def test_shards_hold_what_one_file_holds(tmp_path: Path, recipe: Recipe) -> None:
    model = small_model()
    convert(model, tmp_path / "whole.gguf", recipe)
    report = convert(model, tmp_path / "out.gguf", recipe, shards=Shards(MOST))
    paths = shards(tmp_path)
    assert report.paths == tuple(paths) and report.path == paths[0]
    assert len(paths) > 2 and paths[1].name == f"out-00002-of-{len(paths):05d}.gguf"
    assert report.total_bytes == sum(path.stat().st_size for path in paths)
    whole = GGUFReader(tmp_path / "whole.gguf")
    readers = [GGUFReader(path) for path in paths]
    found = [tensor for reader in readers for tensor in reader.tensors]
    assert [t.name for t in found] == [t.name for t in whole.tensors]
    for mine, theirs in zip(found, whole.tensors, strict=True):
        assert mine.tensor_type == theirs.tensor_type
        np.testing.assert_array_equal(mine.data, theirs.data)
    expected = {n: f.contents() for n, f in whole.fields.items() if not n.startswith("GGUF.")}
    errors = dict(zip(*(expected.pop(key, ()) for key in ERRORS), strict=True))
    for number, (path, reader) in enumerate(zip(paths, readers, strict=True)):
        fields = {n: f.contents() for n, f in reader.fields.items() if not n.startswith("GGUF.")}
        assert fields.pop("split.no") == number
        assert fields.pop("split.count") == len(paths)
        assert fields.pop("split.tensors.count") == len(found)
        own = dict(zip(*(fields.pop(key, ()) for key in ERRORS), strict=True))
        assert own == {n: e for n, e in errors.items() if n in {t.name for t in reader.tensors}}
        assert fields == (expected if number == 0 else {})
        assert path.stat().st_size <= MOST or len(reader.tensors) == 1
    contents = read_contents(paths[0])
    assert contents.file_bytes == report.total_bytes and contents.n_params == model.n_params
    assert read_header(paths[0]).shards == tuple(paths)
    assert recorded_errors(contents) == errors == pytest.approx(report.relative_errors)


def test_a_model_that_fits_is_one_file(tmp_path: Path) -> None:
    report = convert(small_model(), tmp_path / "out.gguf", RECIPES["plain"], shards=Shards(10**9))
    assert list(tmp_path.iterdir()) == [report.path] == [tmp_path / "out.gguf"]
    assert "split.count" not in GGUFReader(report.path).fields


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path: Path) -> None:
    report = convert(small_model(), tmp_path / "out.gguf", Recipe(layout="float"), shards=Shards(1))
    assert [len(GGUFReader(path).tensors) for path in report.paths] == [1] * len(small_model().tensors)


def test_the_plan_knows_the_files(tmp_path: Path) -> None:
    _, layout, _ = plan_file(small_model(), RECIPES["paper"], shards=Shards(MOST))
    report = convert(small_model(), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(MOST))
    assert layout.paths(tmp_path / "out.gguf") == report.paths
    assert [file.total_bytes for file in layout.files] == [path.stat().st_size for path in report.paths]


def test_all_files_or_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        convert(broken("output.weight", np.nan), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(MOST))
    assert list(tmp_path.iterdir()) == []
    convert(small_model(), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(MOST))
    before = {path: path.read_bytes() for path in shards(tmp_path)}
    shards(tmp_path)[0].unlink()
    with pytest.raises(OutputError, match=r"out-00002-of-.*: exists; pass --force"):
        convert(small_model(), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(MOST))
    assert {path: path.read_bytes() for path in shards(tmp_path)} == dict(list(before.items())[1:])
    convert(small_model(), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(MOST), force=True)
    assert {path: path.read_bytes() for path in shards(tmp_path)} == before


@pytest.mark.engine
@pytest.mark.parametrize("recipe", [FLOAT, Recipe(k=2)])
def test_llama_cpp_runs_shards(stories15m: Path, tmp_path: Path, recipe: Recipe) -> None:
    model = open_model(stories15m)
    convert(model, tmp_path / "whole.gguf", recipe)
    report = convert(model, tmp_path / "out.gguf", recipe, shards=Shards(15_000_000))
    assert len(report.paths) > 1
    logits = []
    for path in (tmp_path / "whole.gguf", report.path):
        with Engine(path, EngineOptions(n_threads=1)) as engine:
            tokens = engine.tokenize("Once upon a time there was a little")
            logits.append(np.concatenate([slab.logits for slab in engine.logits(tokens)]))
    np.testing.assert_array_equal(logits[0], logits[1])
