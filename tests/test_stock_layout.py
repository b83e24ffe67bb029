"""The stock layout: one ordinary tensor per weight, refined on the model's own text, for any llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import CheckpointError
from gguf_splitquant.evaluation.compare import compare
from gguf_splitquant.evaluation.text import read_text
from gguf_splitquant.gguf_io.header import read_header
from gguf_splitquant.planning import make_plan
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.runtime.library import find_library
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import to_float32
from tests.gguf_files import FLOAT
from tests.gguf_io.test_file import broken
from tests.sample_models import small_model

UNCALIBRATED = Recipe(layout="stock", qtype="IQ4_NL", calibration="none")


def test_without_statistics_it_runs_nothing_and_beats_the_reference_rounding(tmp_path: Path) -> None:
    model, out = small_model(), tmp_path / "out.gguf"
    report = convert(model, out, Recipe(layout="stock", qtype="Q4_0", calibration="none"))
    tensors = {t.name: t for t in GGUFReader(out).tensors}
    assert list(tensors) == [t.name for t in model.tensors]
    for name, error in report.relative_errors.items():
        (source,) = [t for t in model.tensors if t.name == name]
        weight = to_float32(source.read(), source.dtype)
        stored = quants.dequantize(tensors[name].data, tensors[name].tensor_type)
        assert error == pytest.approx(np.sum((weight - stored) ** 2) / np.sum(weight**2), rel=1e-4)
        plain = quants.dequantize(
            quants.quantize(weight, GGMLQuantizationType.Q4_0), GGMLQuantizationType.Q4_0
        )
        assert error < np.sum((weight - plain) ** 2) / np.sum(weight**2)
    assert set(report.relative_errors) == {"blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight"}


def test_metadata_says_that_any_llama_cpp_runs_it(tmp_path: Path) -> None:
    convert(small_model(), tmp_path / "out.gguf", UNCALIBRATED)
    fields = GGUFReader(tmp_path / "out.gguf").fields
    assert fields["splitquant.layout"].contents() == "stock"
    assert Recipe.from_json(fields["splitquant.recipe"].contents()) == UNCALIBRATED


@pytest.mark.parametrize(
    ("columns", "wanted", "given"),
    [
        (256, "Q4_K", "Q4_K"),
        (96, "Q4_K", "Q5_0"),
        (96, "Q2_K", "IQ4_NL"),
        (96, "Q6_K", "Q8_0"),
        (100, "Q8_0", "BF16"),
    ],
)
def test_narrow_rows_fall_back_as_llama_quantize_does(columns: int, wanted: str, given: str) -> None:
    plan = make_plan(small_model(columns), Recipe(layout="stock", qtype=wanted))
    (query,) = [t for t in plan.tensors if t.source.name == "blk.0.attn_q.weight"]
    assert [o.qtype.name for o in query.outputs] == [given]
    assert bool(query.note) == (wanted != given)


def test_bad_weights_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight: holds NaN"):
        convert(broken("blk.0.attn_q.weight", np.nan), tmp_path / "out.gguf", UNCALIBRATED)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def files(stories15m: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """stories15M as float, and in IQ4_NL with and without statistics."""
    folder = tmp_path_factory.mktemp("stock")
    model = open_model(stories15m)
    made = {name: folder / f"{name}.gguf" for name in ("float", "none", "self")}
    convert(model, made["float"], FLOAT)
    convert(model, made["none"], UNCALIBRATED)
    how = Calibration(own=OwnText(sequences=8, length=192))
    statistics = calibrate_model(model, how)
    convert(model, made["self"], Recipe(layout="stock", qtype="IQ4_NL"), statistics=statistics)
    assert sorted(p.name for p in folder.iterdir()) == ["float.gguf", "none.gguf", "self.gguf"]
    return made


@pytest.mark.engine
def test_the_models_own_text_lowers_the_divergence(files: dict[str, Path]) -> None:
    klds = {
        name: compare(files["float"], files[name], read_text(None), limit_tokens=1024).divergence.kld_mean
        for name in ("none", "self")
    }
    # measured: 0.093 and 0.146, with an eighth of the default text and on prose unlike the model's stories
    assert klds["self"] < 0.75 * klds["none"]
    sizes = {name: sum(t.nbytes for t in read_header(files[name]).tensors) for name in klds}
    assert sizes["self"] == sizes["none"]


@pytest.mark.engine
@pytest.mark.oracle
def test_unpatched_llama_cpp_opens_it(files: dict[str, Path]) -> None:
    folder = find_library(patched=False)
    assert folder is not None, "run `gguf-splitquant build-runtime --stock`"
    program = (
        "import sys; from gguf_splitquant.runtime.engine import Engine\n"
        "with Engine(sys.argv[1]) as e: print(''.join(e.generate_text('Once upon a time', 8)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, files["self"]],
        env={**os.environ, "LLAMA_CPP_LIB_PATH": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
