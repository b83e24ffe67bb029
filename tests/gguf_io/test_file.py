"""The file: readable by gguf-py, exact size known beforehand, complete or not there at all."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, quants

from gguf_splitquant.convert import convert
from gguf_splitquant.errors import CheckpointError, OutputError
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.gguf_io import writer
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources.model import FloatType, SourceModel, to_float32
from tests.sample_models import heavy_tailed, small_model, tensor_of


def read(path: Path) -> dict[str, np.ndarray]:
    return {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(path).tensors}


@pytest.mark.parametrize("dtype", FloatType)
@pytest.mark.parametrize(
    "recipe", [*RECIPES.values(), Recipe(bits=32, outtype="f32"), Recipe(layout="float", outtype="f32")]
)
def test_gguf_py_reads_it_and_the_size_was_known(tmp_path: Path, recipe: Recipe, dtype: FloatType) -> None:
    model, out = small_model(dtype=dtype), tmp_path / "out.gguf"
    plan, layout, _ = plan_file(model, recipe)
    report = convert(model, out, recipe)
    assert out.stat().st_size == layout.total_bytes == report.total_bytes
    tensors = read(out)
    assert list(tensors) == [o.name for o in plan.outputs]
    for planned in plan.tensors:
        original = to_float32(planned.source.read(), dtype)
        total = sum(tensors[o.name].astype(np.float64) for o in planned.outputs)
        error = float(np.sum((total - original) ** 2) / np.sum(original.astype(np.float64) ** 2))
        recorded = report.relative_errors.get(planned.source.name, 0.0)
        assert error == pytest.approx(recorded, rel=1e-4, abs=1e-5)
        if recipe.outtype == "f32":
            np.testing.assert_array_equal(total, original)


def test_metadata_says_how_it_was_made(tmp_path: Path) -> None:
    model, out = small_model(), tmp_path / "out.gguf"
    report = convert(model, out, RECIPES["paper"])
    fields = {name: field.contents() for name, field in GGUFReader(out).fields.items()}
    assert Recipe.from_json(fields["splitquant.recipe"]) == RECIPES["paper"]
    assert fields["splitquant.version"] == 2
    assert fields["splitquant.layout"] == "value"
    assert fields["splitquant.parameter_count"] == model.n_params
    assert fields["general.quantized_by"].startswith("gguf-splitquant ")
    errors = dict(
        zip(fields["splitquant.quantized_tensors"], fields["splitquant.relative_error"], strict=True)
    )
    assert errors == pytest.approx(report.relative_errors)
    assert set(errors) == {"blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight"}


def test_float_layout_adds_no_keys_of_ours(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    convert(small_model(), out, Recipe(layout="float"))
    assert not [name for name in GGUFReader(out).fields if name.startswith("splitquant.")]


def test_threads_do_not_change_a_byte(tmp_path: Path) -> None:
    for granularity in ("tensor", "row"):
        files = []
        for threads in (1, 5):
            out = tmp_path / f"{granularity}-{threads}.gguf"
            convert(small_model(dtype=FloatType.F32), out, Recipe(granularity=granularity), threads=threads)
            files.append(out.read_bytes())
        assert files[0] == files[1]


def test_weights_with_too_few_values_get_empty_sub_layers(tmp_path: Path) -> None:
    model = small_model()
    constant = tensor_of("blk.0.attn_q.weight", np.full((64, 256), 0.5, np.float32))
    model = SourceModel(model.architecture, model.metadata, (constant,), tied_head=True)
    convert(model, tmp_path / "out.gguf", RECIPES["paper"])
    tensors = read(tmp_path / "out.gguf")
    np.testing.assert_allclose(tensors["blk.0.attn_q.weight"], 0.5, rtol=1e-3)
    assert not tensors["blk.0.attn_q.split1.weight"].any()
    assert not tensors["blk.0.attn_q.split2.weight"].any()


def broken(name: str, value: float) -> SourceModel:
    model = small_model()
    weights = heavy_tailed(64, 256)
    weights[3, 4] = value
    tensors = tuple(tensor_of(name, weights) if t.name == name else t for t in model.tensors)
    return SourceModel(model.architecture, model.metadata, tensors, model.tied_head)


@pytest.mark.parametrize(
    ("name", "value"),
    [("blk.0.attn_q.weight", np.nan), ("token_embd.weight", np.inf), ("blk.0.attn_q.weight", 1e30)],
)
def test_bad_weights_leave_nothing_behind(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=name):
        convert(broken(name, value), tmp_path / "out.gguf", RECIPES["paper"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", [RECIPES["paper"], Recipe(layout="float", outtype="f16")])
def test_values_beyond_f16_are_refused_not_written_as_infinity(tmp_path: Path, recipe: Recipe) -> None:
    model = broken("token_embd.weight", 1e6)
    with pytest.raises(
        CheckpointError, match=r"token_embd\.weight: .*9.994e\+05, beyond f16.*--outtype bf16"
    ):
        convert(model, tmp_path / "out.gguf", dataclasses.replace(recipe, outtype="f16"))
    assert list(tmp_path.iterdir()) == []
    convert(model, tmp_path / "out.gguf", dataclasses.replace(recipe, outtype="bf16"))


def test_names_that_the_file_system_refuses(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="too long; choose another name"):
        convert(small_model(), tmp_path / ("x" * 300), RECIPES["plain"])
    longest = tmp_path / ("x" * 255)
    convert(small_model(), longest, RECIPES["plain"])
    assert list(tmp_path.iterdir()) == [longest]


def test_devices_and_dangling_links_are_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="special file"):
        convert(small_model(), Path(os.devnull), RECIPES["plain"], force=True)
    link = tmp_path / "out.gguf"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="exists; pass --force"):
        convert(small_model(), link, RECIPES["plain"])
    assert link.is_symlink()


def test_another_runs_partial_file_is_left_alone(tmp_path: Path) -> None:
    other = tmp_path / "out.gguf.partial"
    other.write_bytes(b"theirs")
    convert(small_model(), tmp_path / "out.gguf", RECIPES["plain"])
    assert other.read_bytes() == b"theirs"


def test_a_full_temporary_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(OutputError, match=r"temporary folder: .*; set TMPDIR"):
        convert(small_model(), tmp_path / "out.gguf", RECIPES["plain"])
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept_unless_forced(tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"out\.gguf: exists; pass --force"):
        convert(small_model(), out, RECIPES["plain"])
    with pytest.raises(CheckpointError):
        convert(broken("blk.0.attn_q.weight", np.nan), out, RECIPES["plain"], force=True)
    assert out.read_bytes() == b"precious"
    convert(small_model(), out, RECIPES["plain"], force=True)
    assert GGUFReader(out).tensors


@pytest.mark.parametrize("target", ["folder", "missing/out.gguf"])
def test_impossible_targets(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=Path(target).name):
        convert(small_model(), tmp_path / target, RECIPES["plain"])
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_disk_too_small_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OutputError, match=r"1,000 left; free some space"):
        convert(small_model(), tmp_path / "out.gguf", RECIPES["plain"])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(small_disk: Path) -> None:
    model = small_model()
    first, *others = model.tensors

    def read_while_another_writer_takes_the_space(start: int, stop: int) -> np.ndarray:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
            while filler.write(bytes(4096)):
                pass
        return first.read_rows(start, stop)

    greedy = dataclasses.replace(first, read_rows=read_while_another_writer_takes_the_space)
    model = dataclasses.replace(model, tensors=(greedy, *others))
    with pytest.raises(OutputError, match=r"out\.gguf: the disk is full; free some space"):
        convert(model, small_disk / "out.gguf", RECIPES["paper"], threads=1)
    assert [p.name for p in small_disk.iterdir()] == ["filler"]
