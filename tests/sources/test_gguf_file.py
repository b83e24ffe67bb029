"""GGUF files as input: of a float file nothing is lost, quantized ones are taken only on request."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValue, GGUFValueType
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_splitquant.calibration.calibrate import Calibration
from gguf_splitquant.calibration.checkpoint import calibrate_model
from gguf_splitquant.calibration.own_text import OwnText
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import SplitQuantError, UnsupportedModelError
from gguf_splitquant.gguf_io.pairs import read_pairs
from gguf_splitquant.planning.roles import Role, role_of
from gguf_splitquant.recipe import OutType, Recipe
from gguf_splitquant.sources import open_model
from gguf_splitquant.sources.model import FloatType, to_float32
from tests.runtime.tiny_models import llama, plm
from tests.runtime.tiny_models import write as write_tiny
from tests.sample_models import small_model

from .family_cases import ALL_CASES
from .raw_gguf import RawGGUF, read_raw

F16 = GGMLQuantizationType.F16
# our writer puts these two behind the others
MOVED = ("general.file_type", "general.quantization_version")


def float_again(path: Path, folder: Path, outtype: str) -> RawGGUF:
    out = folder / "again.gguf"
    convert(open_model(path), out, Recipe(layout="float", outtype=outtype), force=True)
    return read_raw(out)


def assert_same(mine: RawGGUF, theirs: RawGGUF) -> None:
    assert mine.tensors == theirs.tensors
    # the official converter leaves the file type out of GPT-NeoX
    assert {**mine.pairs, **theirs.pairs} == mine.pairs
    assert mine.pairs.keys() - theirs.pairs.keys() <= {"general.file_type"}
    order = [key for key in theirs.pairs if key not in MOVED]
    assert [key for key in mine.pairs if key not in MOVED] == order


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16"])
def test_a_float_file_comes_out_as_it_went_in(stories15m: Path, tmp_path: Path, outtype: str) -> None:
    path = tmp_path / "in.gguf"
    convert(open_model(stories15m), path, Recipe(layout="float", outtype=outtype))
    assert_same(float_again(path, tmp_path, outtype), read_raw(path))


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name, case in ALL_CASES.items() if not case.no_official])
def test_official_files_of_every_family_come_out_as_they_went_in(
    official_files: Path, tmp_path: Path, name: str
) -> None:
    for outtype in ALL_CASES[name].outtypes:
        path = official_files / f"{name}.{outtype}.gguf"
        assert_same(float_again(path, tmp_path, outtype), read_raw(path))


@pytest.mark.oracle
@pytest.mark.parametrize("name", [name for name, case in ALL_CASES.items() if not case.no_official])
def test_the_same_weights_are_split_as_from_the_checkpoint(official_files: Path, name: str) -> None:
    case = ALL_CASES[name]
    checkpoint = open_model(official_files / name, pre_tokenizer=case.pre)
    file = open_model(official_files / f"{name}.{case.outtypes[0]}.gguf")
    assert {t.name: role_of(t) for t in file.tensors} == {t.name: role_of(t) for t in checkpoint.tensors}
    assert file.tied_head == checkpoint.tied_head


@pytest.mark.parametrize("dtype", FloatType)
def test_every_layout_is_that_of_the_checkpoint(tmp_path: Path, dtype: FloatType) -> None:
    model, path = small_model(dtype=dtype), tmp_path / "in.gguf"
    convert(model, path, Recipe(layout="float", outtype=dtype.value.lower()))
    again = open_model(path)
    for recipe in (Recipe(), Recipe(layout="stock", qtype="Q8_0", calibration="none")):
        convert(model, tmp_path / "a.gguf", recipe, force=True)
        convert(again, tmp_path / "b.gguf", recipe, force=True)
        assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_metadata_of_every_type_is_carried_over(tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    text, array = GGUFValueType.STRING, GGUFValueType.ARRAY
    pairs = {
        "tokenizer.ggml.tokens": GGUFValue(["a", "\u00e9", b"\xff\xfe"], array, text),
        "x.numbers": GGUFValue([1, -2], array, GGUFValueType.INT8),
        "x.flags": GGUFValue([True, False], array, GGUFValueType.BOOL),
        "x.double": GGUFValue(0.1, GGUFValueType.FLOAT64),
        "x.large": GGUFValue(2**63, GGUFValueType.UINT64),
    }
    dropped = {
        "general.alignment": GGUFValue(64, GGUFValueType.UINT32),
        "quantize.imatrix.file": GGUFValue("m", text),
        "general.quantized_by": GGUFValue("someone", text),
    }
    model = small_model()
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0] = {**model.metadata, **pairs, **dropped}
    writer.data_alignment = 64
    for tensor in model.tensors:
        writer.add_tensor(tensor.name, to_float32(tensor.read(), tensor.dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = read_pairs(path)
    assert found == {**model.metadata, **pairs, **dropped}
    again = open_model(path)
    assert again.metadata == {**model.metadata, **pairs}
    for mine, theirs in zip(again.tensors, model.tensors, strict=True):
        np.testing.assert_array_equal(mine.read(), to_float32(theirs.read(), theirs.dtype))


def shards(tmp_path: Path, n: int = 2) -> list[Path]:
    """A model in shards of ``n`` tensors, by gguf-py's writer."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=n)
    writer.add_string("general.name", "small")
    for tensor in small_model().tensors:
        writer.add_tensor(tensor.name, to_float32(tensor.read(), tensor.dtype).astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(tmp_path.glob("m-*.gguf"))


def test_shards_are_one_model(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    assert [p.name for p in paths] == [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    model, original = open_model(paths[0]), small_model()
    assert [t.name for t in model.tensors] == [t.name for t in original.tensors]
    for mine, theirs in zip(model.tensors, original.tensors, strict=True):
        want = to_float32(theirs.read(), theirs.dtype).astype(np.float16)
        np.testing.assert_array_equal(mine.read(), want)
    assert not any(key.startswith("split.") for key in model.metadata)
    assert model.float_file is None  # llama.cpp would open it, but the digest of one shard is not the model's


def test_shards_that_do_not_belong_together(tmp_path: Path) -> None:
    paths = shards(tmp_path)
    with pytest.raises(SplitQuantError, match=r"is one of 3 shards; give the first, m-00001-of-00003"):
        open_model(paths[1])
    third = paths[2].read_bytes()
    paths[2].write_bytes(paths[1].read_bytes())
    with pytest.raises(SplitQuantError, match=r"m-00003-of-00003\.gguf: says that it is shard 1 of 3"):
        open_model(paths[0])
    paths[2].write_bytes(third)
    paths[1].rename(tmp_path / "away.gguf")
    with pytest.raises(SplitQuantError, match=r"its shard m-00002-of-00003\.gguf is missing; download it"):
        open_model(paths[0])
    renamed = paths[0].rename(tmp_path / "first.gguf")
    with pytest.raises(SplitQuantError, match="its name is not that of the first"):
        open_model(renamed)


def quantized(tmp_path: Path, **types: GGMLQuantizationType) -> Path:
    kinds = {name.replace("__", ".") + ".weight": kind for name, kind in types.items()}
    return write_tiny(llama(), tmp_path / "q.gguf", kinds)


def test_quantized_weights_only_on_request(tmp_path: Path) -> None:
    path = quantized(
        tmp_path, blk__0__ffn_up=GGMLQuantizationType.Q4_0, blk__1__ffn_up=GGMLQuantizationType.Q8_0
    )
    with pytest.raises(
        UnsupportedModelError, match=r"already quantized: 1 Q4_0, 1 Q8_0; .*--allow-requantize"
    ):
        open_model(path)
    model = open_model(path, allow_requantize=True)
    (note,) = model.notes
    n = 2 * llama().tensors["blk.0.ffn_up.weight"].size
    assert f"q.gguf: {n:,} of its weights" in note and "loses more" in note
    stored = {t.name: t for t in gguf.GGUFReader(path).tensors}
    for tensor in model.tensors:
        want = gguf.dequantize(stored[tensor.name].data, stored[tensor.name].tensor_type)
        np.testing.assert_array_equal(to_float32(tensor.read(), tensor.dtype), want)
        np.testing.assert_array_equal(tensor.read_rows(1, 2), tensor.read()[1:2])
    assert model.float_file is None


def test_what_cannot_be_a_source(tmp_path: Path) -> None:
    split = tmp_path / "split.gguf"
    convert(small_model(), split, Recipe())
    with pytest.raises(
        UnsupportedModelError, match=r"is already split \(blk\.0\.attn_q\.split1\.weight and 5"
    ):
        open_model(split, allow_requantize=True)
    other = tmp_path / "other.gguf"
    for pairs, words in (
        ({"general.type": "adapter"}, "of type 'adapter', not a model"),
        ({}, "holds no weights, only a vocabulary"),
    ):
        writer = gguf.GGUFWriter(other, "llama")
        for key, value in pairs.items():
            writer.add_string(key, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(UnsupportedModelError, match=words):
            open_model(other)
    tiny = dataclasses.replace(llama(), tensors={"x.weight": np.zeros((2, 32), np.int32)})
    with pytest.raises(UnsupportedModelError, match=r"tensor x\.weight: is I32"):
        open_model(write_tiny(tiny, other))


def test_a_folder_of_gguf_files_names_one(tmp_path: Path) -> None:
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(SplitQuantError, match=r"but GGUF files \(b\.gguf\); give the file: .*b\.gguf"):
        open_model(tmp_path)


def test_pre_tokenizer(stories15m: Path, tmp_path: Path) -> None:
    path = tmp_path / "in.gguf"
    model = small_model()
    tokenizer = {"tokenizer.ggml.pre": GGUFValue("default", GGUFValueType.STRING)}
    convert(
        dataclasses.replace(model, metadata={**model.metadata, **tokenizer}), path, Recipe(layout="float")
    )
    assert open_model(path, pre_tokenizer="qwen2").metadata["tokenizer.ggml.pre"].value == "qwen2"
    with pytest.raises(SplitQuantError, match=r"--pre qwen3.*did you mean"):
        open_model(path, pre_tokenizer="qwen3")


def test_other_architectures_keep_what_is_not_linear(tmp_path: Path) -> None:
    """An architecture that is not read from checkpoints, with a projection kept F32 among 16-bit weights."""
    tiny = plm()
    types = {name: F16 for name in tiny.tensors if "norm" not in name and "kv_a_mqa" not in name}
    model = open_model(write_tiny(tiny, tmp_path / "in.gguf", types))
    roles = {t.name: role_of(t) for t in model.tensors}
    assert roles["blk.0.attn_kv_a_mqa.weight"] is Role.OTHER
    assert roles["blk.0.attn_q.weight"] is Role.LINEAR
    raw = float_again(tmp_path / "in.gguf", tmp_path, "auto")
    assert raw.tensors == read_raw(tmp_path / "in.gguf").tensors


@settings(max_examples=150)
@given(position=st.integers(0, 700), value=st.binary(min_size=1, max_size=8))
def test_damage_is_an_error_or_harmless(
    position: int, value: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged-model.gguf"
    data = bytearray(write_tiny(llama(n_layer=1), path).read_bytes())
    data[position : position + len(value)] = value
    path.write_bytes(data)
    try:
        model = open_model(path, allow_requantize=True)
        for tensor in model.tensors:
            assert tensor.read().shape == tensor.shape
    except SplitQuantError as error:
        assert re.match(r"\S*damaged-model\.gguf: ", str(error))


@pytest.mark.engine
@pytest.mark.parametrize("outtype", ["f16", "f32"])
def test_calibration_runs_a_float_file_itself(stories15m: Path, tmp_path: Path, outtype: OutType) -> None:
    path = tmp_path / "float.gguf"
    convert(open_model(stories15m), path, Recipe(layout="float", outtype=outtype))
    how = Calibration(own=OwnText(2, 16))
    assert len(calibrate_model(open_model(path), how, threads=1).sharing) == 6 * 7 + 1
    assert list(tmp_path.iterdir()) == [path]
