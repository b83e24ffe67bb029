"""Verification: what is right matches, and whatever is changed is named."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValue, GGUFValueType

from gguf_splitquant.calibration.imatrix import read_imatrix, write_moments
from gguf_splitquant.calibration.moments import Moments
from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import VerificationError
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.gguf_io.header import read_file_header, read_header
from gguf_splitquant.gguf_io.layout import build_layout
from gguf_splitquant.gguf_io.metadata import KEY_CALIBRATION
from gguf_splitquant.gguf_io.pairs import read_pairs
from gguf_splitquant.gguf_io.sharding import Shards
from gguf_splitquant.planning.plan import OutputTensor
from gguf_splitquant.recipe import RECIPES, Recipe
from gguf_splitquant.sources.model import SourceModel
from gguf_splitquant.verification import Verification, read_recipe, verify
from tests.sample_models import heavy_tailed, small_model, tensor_of

NONE = Recipe(layout="stock", target_bpw=4.9, calibration="none", embedding="Q8_0")
SPLIT = RECIPES["split"]


def flip(path: Path, tensor: str, byte: int = 0) -> None:
    """Change one bit of a tensor in place."""
    (entry,) = [t for t in read_header(path).tensors if t.name == tensor]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset + byte)
        old = file.read(1)[0]
        file.seek(entry.offset + byte)
        file.write(bytes([old ^ 1]))


def without(path: Path, key: str) -> None:
    """Write a file again without one key, as an older version would have."""
    pairs = read_pairs(path)
    del pairs[key]
    with_pairs(path, pairs)


def with_pairs(path: Path, pairs: dict[str, GGUFValue]) -> None:
    """Write a file again with other metadata."""
    header, data = read_file_header(path), path.read_bytes()
    outputs = [OutputTensor(t.name, t.qtype, t.shape) for t in header.tensors]
    layout = build_layout("llama", pairs, outputs)
    whole = bytearray(layout.total_bytes)
    whole[: len(layout.header)] = layout.header
    for t in header.tensors:
        start = layout.offsets[t.name]
        whole[start : start + t.nbytes] = data[t.offset : t.offset + t.nbytes]
    path.write_bytes(whole)


def subjects(found: Verification) -> list[str]:
    return [d.subject for d in found.differences]


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPES["paper"],
        Recipe(k=1, bits=8, granularity="row"),
        Recipe(k=2, bits=32),
        Recipe(layout="float", outtype="bf16"),
        Recipe(layout="stock", qtype="Q4_0", calibration="none"),
        NONE,
    ],
    ids=["paper", "row", "value-float", "float", "one-type", "planned"],
)
@pytest.mark.parametrize("shard_bytes", [None, 20_000])
def test_what_was_converted_matches(recipe: Recipe, shard_bytes: int | None, tmp_path: Path) -> None:
    model = small_model()
    made = convert(model, tmp_path / "out.gguf", recipe, shards=Shards(most_bytes=shard_bytes))
    assert (len(made.paths) > 1) == (shard_bytes is not None)
    found = verify(read_recipe(made.path), model, tensors=None)
    assert found.matches and found.notes == ()
    assert found.checked == tuple(t.name for t in model.tensors)
    assert found.compared_bytes == sum(t.nbytes for t in read_header(made.path).tensors)


@pytest.mark.parametrize("recipe", [RECIPES["paper"], NONE], ids=["paper", "planned"])
@pytest.mark.parametrize("byte", [0, 100, -1])
def test_one_changed_bit_of_any_tensor_is_found(recipe: Recipe, byte: int, tmp_path: Path) -> None:
    model = small_model()
    right = convert(model, tmp_path / "right.gguf", recipe).path
    for entry in read_header(right).tensors:
        wrong = shutil.copy(right, tmp_path / "wrong.gguf")
        flip(wrong, entry.name, byte % entry.nbytes)
        found = verify(read_recipe(wrong), model, tensors=None)
        assert [str(d) for d in found.differences] == [f"{entry.name}: 1 of {entry.nbytes:,} bytes differ"]


def test_another_source_is_found(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    changed = heavy_tailed(96, 256, seed=4)
    changed[50, 7] += 0.1
    tensors = tuple(
        tensor_of(t.name, changed) if t.name == "blk.0.ffn_up.weight" else t for t in model.tensors
    )
    found = verify(read_recipe(out), dataclasses.replace(model, tensors=tensors), tensors=None)
    assert subjects(found) == ["blk.0.ffn_up.weight", "metadata splitquant.relative_error"]


def test_metadata_is_compared(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    right = out.read_bytes()
    out.write_bytes(right.replace(b"small", b"smell", 1))
    found = verify(read_recipe(out), model)
    assert [str(d) for d in found.differences] == [
        "metadata general.name: is 'smell' in the file, not 'small'"
    ]
    out.write_bytes(right.replace(b"splitquant.parameter_count", b"splitquant.paramotor_count", 1))
    assert subjects(verify(read_recipe(out), model)) == [
        "metadata splitquant.parameter_count",
        "metadata splitquant.paramotor_count",
    ]
    out.write_bytes(right + b"something behind the end")
    assert [str(d) for d in verify(read_recipe(out), model).differences] == [
        "out.gguf: has 24 bytes behind its last tensor"
    ]


def text(value: str) -> GGUFValue:
    return GGUFValue(value, GGUFValueType.STRING)


@pytest.mark.parametrize(
    "key", ["split.evil", "split.count", "general.source.evil", "tokenizer.chat_template", "zzz"]
)
def test_no_key_is_added_to_any_shard(key: str, tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    with_pairs(out, {**read_pairs(out), key: text("x" * 1000)} if key != "split.count" else counted(out))
    found = verify(read_recipe(out), model)
    assert [str(d) for d in found.differences] == [f"metadata {key}: is in the file only"]
    if key == "split.count":
        return
    for number in range(2):
        made = convert(model, tmp_path / f"{number}.gguf", NONE, shards=Shards(count=2))
        shard = made.paths[number]
        with_pairs(shard, {**read_pairs(shard), key: text("x" * 1000)})
        where = f" of {shard.name}" if number else ""
        assert subjects(verify(read_recipe(made.path), model)) == [f"metadata {key}{where}"]


def counted(path: Path) -> dict[str, GGUFValue]:
    return {**read_pairs(path), "split.count": GGUFValue(1, GGUFValueType.UINT16)}


def test_shards_say_what_they_are(tmp_path: Path) -> None:
    model = small_model()
    made = convert(model, tmp_path / "out.gguf", NONE, shards=Shards(count=2))
    shard = made.paths[1]
    pairs = read_pairs(shard)
    with_pairs(shard, {key: value for key, value in pairs.items() if key != "split.tensors.count"})
    name = f"of {shard.name}"
    assert subjects(verify(read_recipe(made.path), model)) == [f"metadata split.tensors.count {name}"]
    with_pairs(shard, dict(reversed(pairs.items())))
    (difference,) = verify(read_recipe(made.path), model).differences
    assert str(difference).endswith(f"{name}: stands at another place")


def test_what_is_not_compared_by_value_has_its_form(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    right = read_pairs(out)
    errors = right["splitquant.relative_error"]
    for wrong in (
        text("evil"),
        GGUFValue([*errors.value, 0.0], GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        GGUFValue([str(e) for e in errors.value], GGUFValueType.ARRAY, GGUFValueType.STRING),
    ):
        with_pairs(out, {**right, "splitquant.relative_error": wrong})
        assert subjects(verify(read_recipe(out), model)) == ["metadata splitquant.relative_error"]
    with_pairs(out, {**right, "general.quantized_by": text("evil")})
    assert subjects(verify(read_recipe(out), model)) == ["metadata general.quantized_by"]
    without(out, "general.quantized_by")
    assert subjects(verify(read_recipe(out), model)) == ["metadata general.quantized_by"]


@pytest.mark.parametrize("tensors", [0, None])
@pytest.mark.parametrize("count", [None, 2])
def test_padding_is_compared(tensors: int | None, count: int | None, tmp_path: Path) -> None:
    model = odd_model()
    made = convert(model, tmp_path / "out.gguf", NONE, shards=Shards(count=count))
    assert verify(read_recipe(made.path), model, tensors=tensors).matches
    entry = read_header(made.path).tensors[-1]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset + entry.nbytes)
        file.write(b"evil")
    found = verify(read_recipe(made.path), model, tensors=tensors)
    said = f"{entry.file.name}: 4 bytes of padding between tensors are not zero"
    assert [str(d) for d in found.differences] == [said]


def test_a_file_without_its_last_padding_differs(tmp_path: Path) -> None:
    model = odd_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    out.write_bytes(out.read_bytes()[:-5])
    found = verify(read_recipe(out), model)
    said = "out.gguf: ends 5 bytes early, in the padding of its last tensor"
    assert [str(d) for d in found.differences] == [said]


def test_the_padding_of_the_header_is_compared(tmp_path: Path) -> None:
    model = dataclasses.replace(small_model(), metadata={**small_model().metadata, "a": text("")})
    # some length of the text leaves room before the tensors
    for length in range(2):
        pairs = {**model.metadata, "a": text("x" * length)}
        model = dataclasses.replace(model, metadata=pairs)
        out = convert(model, tmp_path / f"{length}.gguf", NONE).path
        start = read_header(out).tensors[0].offset
        data = bytearray(out.read_bytes())
        if data[start - 1] == 0 and data[start - 4 : start] == bytes(4):
            break
    data[start - 1] = 7
    out.write_bytes(data)
    said = f"{out.name}: 1 bytes of its header differ"
    assert [str(d) for d in verify(read_recipe(out), model).differences] == [said]


def test_nothing_lies_between_header_and_tensors(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    data, entries = out.read_bytes(), read_header(out).tensors
    names = [entry.name.encode() for entry in entries]
    # 64 bytes before the first tensor, or before the last
    for gap in (0, len(entries) - 1):
        header, start = bytearray(data[: entries[0].offset]), entries[0].offset
        for name, entry in list(zip(names, entries, strict=True))[gap:]:
            at = header.rindex(len(name).to_bytes(8, "little") + name) + 8 + len(name)
            at += 4 + 8 * len(entry.shape) + 4
            header[at : at + 8] = (entry.offset - start + 64).to_bytes(8, "little")
        place = entries[gap].offset
        out.write_bytes(bytes(header) + data[start:place] + b"evil" * 16 + data[place:])
        found = verify(read_recipe(out), model)
        assert f"not {place:,}" in str(found.differences[-1]), found.differences


def odd_model() -> SourceModel:
    """One whose last tensor does not end at a multiple of 32 bytes."""
    model = small_model()
    bias = tensor_of("output.bias", np.ones(5, np.float32))
    return dataclasses.replace(model, tensors=(*model.tensors, bias))


@pytest.mark.parametrize("tensors", [0, None])
def test_a_target_that_the_file_exceeds_is_a_note(tensors: int | None, tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    changed = dataclasses.replace(NONE, target_bpw=4.7)
    with_pairs(out, {**read_pairs(out), "splitquant.recipe": text(changed.to_json())})
    found = verify(read_recipe(out), model, tensors=tensors)
    assert found.matches and "bits per weight, and its recipe asks for 4.7: " in found.notes[0]
    size = out.stat().st_size
    changed = dataclasses.replace(NONE, target_bpw=None, target_size=size - 1000)
    with_pairs(out, {**read_pairs(out), "splitquant.recipe": text(changed.to_json())})
    found = verify(read_recipe(out), model, tensors=tensors)
    assert f"bytes, and its recipe asks for {size - 1000:,}: " in found.notes[0]


def test_types_are_compared_with_a_recipe_that_names_them(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", Recipe(layout="stock", qtype="Q4_0", calibration="none")).path
    out.write_bytes(out.read_bytes().replace(b'"qtype": "Q4_0"', b'"qtype": "Q5_1"', 1))
    found = verify(read_recipe(out), model)
    weights = ["blk.0.attn_q.weight", "blk.0.ffn_up.weight", "output.weight"]
    assert [s for s in subjects(found) if not s.startswith("metadata")] == weights
    assert "is Q4_0 [64, 256] in the file, not Q5_1 [64, 256]" in str(found.differences[0])


def test_a_plan_of_ones_own_is_a_note(tmp_path: Path) -> None:
    model = small_model()
    _, _, planned = plan_file(model, Recipe(layout="stock", qtype="Q8_0", calibration="none"))
    _, _, default = plan_file(model, NONE)
    assert default is not None
    wide = dict.fromkeys(default.pieces, next(iter(default.pieces.values())))
    mine = dataclasses.replace(default, pieces={n: wide[n] for n in wide})
    assert planned is None
    out = convert(model, tmp_path / "out.gguf", NONE, refined=mine).path
    found = verify(read_recipe(out), model, tensors=None)
    assert found.matches
    assert bool(found.notes) == (dict(mine.pieces) != dict(default.pieces))


def test_other_versions_are_named(tmp_path: Path) -> None:
    model = small_model()
    out = convert(model, tmp_path / "out.gguf", NONE).path
    data = out.read_bytes()
    out.write_bytes(re.sub(rb"gguf-splitquant \d", b"gguf-splitquant 9", data, count=1))
    found = verify(read_recipe(out), model)
    assert found.matches and "made by gguf-splitquant 9." in found.notes[0]
    key = b"splitquant.version" + (4).to_bytes(4, "little")
    at = data.index(key) + len(key)
    out.write_bytes(data[:at] + (99).to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(VerificationError, match="has format version 99"):
        read_recipe(out)


def test_a_file_of_others_cannot_be_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = convert(small_model(), tmp_path / "out.gguf", NONE).path
    without(out, "splitquant.recipe")
    assert main(["verify", str(out), "--source", str(tmp_path)]) == 2
    assert "out.gguf: does not say how it was made" in capsys.readouterr().err


@pytest.fixture(scope="module")
def split(stories: SourceModel, stories_moments: Moments, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("split") / "split.gguf"
    return convert(stories, out, SPLIT, statistics=stories_moments, shards=Shards(most_bytes=5_000_000)).path


def copy_of(path: Path, folder: Path) -> Path:
    for shard in read_header(path).shards:
        shutil.copy(shard, folder)
    return folder / path.name


@pytest.mark.engine
def test_a_split_file_in_shards_matches(stories: SourceModel, stories_moments: Moments, split: Path) -> None:
    assert len(read_header(split).shards) > 1
    found = verify(read_recipe(split), stories, statistics=stories_moments, tensors=None)
    assert found.matches and found.notes == ()
    assert len(found.checked) == len(stories.tensors)


def test_a_sample_has_every_kind_of_layer(stories: SourceModel, tmp_path: Path) -> None:
    def kinds(names: list[str]) -> set[str]:
        return {re.sub(r"\d+", "N", name) for name in names}

    stored = read_recipe(convert(stories, tmp_path / "out.gguf", Recipe(k=1)).path)
    samples = [verify(stored, stories, seed=seed).checked for seed in (0, 1, 0)]
    every = [t.name for t in stories.tensors]
    assert kinds(list(samples[0])) == kinds(every) and len(samples[0]) < len(every)
    assert samples[0] == samples[2] != samples[1]
    more = verify(stored, stories, tensors=len(samples[0]) + 2, seed=0).checked
    assert len(more) == len(samples[0]) + 2 and set(samples[0]) < set(more)


def test_every_sample_is_another_one_and_can_be_taken_again(stories: SourceModel, tmp_path: Path) -> None:
    stored = read_recipe(convert(stories, tmp_path / "out.gguf", Recipe(k=1)).path)
    samples = [verify(stored, stories) for _ in range(3)]
    assert len({found.seed for found in samples}) == 3
    again = verify(stored, stories, seed=samples[0].seed)
    assert again == samples[0]
    assert verify(stored, stories, tensors=None).seed is None


def test_the_command_line_says_the_seed(
    stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out.gguf")
    assert main(["convert", str(stories15m), out, "--recipe", "plain"]) == 0
    capsys.readouterr()
    command = ["verify", out, "--source", str(stories15m)]
    assert main(command) == 0
    said = re.search(r"bytes, --seed (\d+)\), metadata", capsys.readouterr().out)
    assert said is not None
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] != int(said[1])
    assert main([*command, "--json", "--seed", said[1]]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == int(said[1])


@pytest.mark.engine
def test_a_changed_channel_order_is_found(
    stories: SourceModel, stories_moments: Moments, split: Path, tmp_path: Path
) -> None:
    wrong = copy_of(split, tmp_path)
    order = next(t for t in read_header(wrong).tensors if t.name.endswith(".order"))
    data = np.memmap(order.file, np.uint8, "r+", offset=order.offset, shape=(order.nbytes,))
    data[:] = data[::-1].copy()
    data.flush()
    assert subjects(verify(read_recipe(wrong), stories, statistics=stories_moments)) == [order.name]


@pytest.mark.engine
def test_other_statistics_are_not_other_bytes(
    stories: SourceModel, stories_moments: Moments, split: Path, tmp_path: Path
) -> None:
    stored = read_recipe(split)
    with pytest.raises(VerificationError, match="was made with statistics of layer inputs; give the same"):
        verify(stored, stories)
    write_moments(tmp_path / "imatrix.gguf", stories_moments)
    others = read_imatrix(tmp_path / "imatrix.gguf")
    with pytest.raises(VerificationError, match=r"was made with other statistics .* than those at hand"):
        verify(stored, stories, statistics=others)


@pytest.mark.engine
def test_the_command_line(
    stories15m: Path,
    stories: SourceModel,
    stories_moments: Moments,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    imatrix, out = tmp_path / "imatrix.gguf", tmp_path / "out.gguf"
    write_moments(imatrix, stories_moments)
    recipe = ["--recipe", "stock", "--target-bpw", "5", "--imatrix", str(imatrix)]
    assert main(["convert", str(stories15m), str(out), *recipe]) == 0
    command = ["verify", str(out), "--source", str(stories15m)]
    capsys.readouterr()
    assert main([*command, "--imatrix", str(imatrix), "--all"]) == 0
    assert capsys.readouterr().out.startswith(
        f"match: {len(stories.tensors)} of {len(stories.tensors)} tensors"
    )
    assert main(command) == 2
    assert "was made with --imatrix; give the same file" in capsys.readouterr().err
    assert main([*command, "--calibration-text", str(imatrix)]) == 2
    capsys.readouterr()
    flip(out, "blk.2.ffn_norm.weight")
    flip(out, "blk.3.attn_q.weight", 7)
    assert main([*command, "--imatrix", str(imatrix), "--all", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert not told["matches"]
    wrong = [d["subject"] for d in told["differences"]]
    assert sorted(wrong) == ["blk.2.ffn_norm.weight", "blk.3.attn_q.weight"]


@pytest.mark.engine
def test_a_file_from_before_statistics_were_recorded(
    stories: SourceModel, stories_moments: Moments, tmp_path: Path
) -> None:
    recipe = Recipe(layout="stock", qtype="IQ4_NL")
    out = convert(stories, tmp_path / "old.gguf", recipe, statistics=stories_moments).path
    without(out, KEY_CALIBRATION)
    found = verify(read_recipe(out), stories, statistics=stories_moments)
    assert found.matches and "does not record its statistics" in found.notes[0]
