"""A file that is there counts as this conversion's own only if it is: nothing else is taken for done."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import OutputError
from gguf_splitquant.gguf_io.header import read_header
from gguf_splitquant.gguf_io.sharding import Shards
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.sources import open_model
from tests.sources.handmade import CONFIG, header_of, llama_shapes, write_checkpoint, write_safetensors

WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 3}
RECIPES = {
    "value split": Recipe(layout="value"),
    "stock": Recipe(layout="stock", target_bpw=4.9, embedding="Q8_0", calibration="none"),
    "float": Recipe(layout="float"),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_checkpoint(tmp_path_factory.mktemp("completed") / "model", **WIDE)
    write_safetensors(folder / "model.safetensors", header_of(llama_shapes({**CONFIG, **WIDE}), "BF16"))
    return folder


def written(path: Path) -> tuple[int, bytes]:
    return path.stat().st_mtime_ns, path.read_bytes()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_complete_file_is_left_as_it_is(checkpoint: Path, tmp_path: Path, recipe: Recipe) -> None:
    out = tmp_path / "out.gguf"
    model = open_model(checkpoint)
    first = convert(model, out, recipe)
    before = written(out)
    again = convert(model, out, recipe, resume=True)
    assert again.complete_before and not first.complete_before
    assert written(out) == before
    assert again.paths == first.paths and again.total_bytes == first.total_bytes
    assert again.relative_errors == pytest.approx(dict(first.relative_errors), rel=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


@pytest.mark.parametrize("shards", [Shards(count=3), Shards(count=3, only=(2, 3))], ids=["all", "one"])
def test_shards_too(checkpoint: Path, tmp_path: Path, shards: Shards) -> None:
    model, recipe = open_model(checkpoint), RECIPES["stock"]
    paths = convert(model, tmp_path / "out.gguf", recipe, shards=shards).paths
    before = [written(path) for path in paths]
    assert convert(model, tmp_path / "out.gguf", recipe, shards=shards, resume=True).complete_before
    assert [written(path) for path in paths] == before
    paths[-1].unlink()
    if len(paths) > 1:
        with pytest.raises(OutputError, match="exists"):
            convert(model, tmp_path / "out.gguf", recipe, shards=shards, resume=True)


def test_one_that_differs_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    model, recipe = open_model(checkpoint), RECIPES["stock"]
    convert(model, out, recipe)
    whole = out.read_bytes()
    (norm,) = (t for t in read_header(out).tensors if t.name == "output_norm.weight")
    errors = whole.index(b"splitquant.relative_error") + len("splitquant.relative_error") + 4
    # the last weight, the one of its kind, the header, and errors that are no floats
    for place, bits in ((len(whole) - 1, 1), (norm.offset, 1), (40, 1), (errors, 6 ^ 4), (errors, 6 ^ 8)):
        changed = bytearray(whole)
        changed[place] ^= bits
        out.write_bytes(changed)
        with pytest.raises(OutputError, match="exists"):
            convert(model, out, recipe, resume=True)
        assert out.read_bytes() == changed
    out.write_bytes(whole[:-1])
    with pytest.raises(OutputError, match="exists"):
        convert(model, out, recipe, resume=True)


def test_that_of_another_checkpoint_or_recipe_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """With the same names and shapes, and the same size to the byte."""
    other = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-2000:] = weights[-4000:-2000]
    (other / "model.safetensors").write_bytes(weights)
    out = tmp_path / "out.gguf"
    recipe = RECIPES["value split"]
    convert(open_model(checkpoint), out, recipe)
    with pytest.raises(OutputError, match="exists"):
        convert(open_model(other), out, recipe, resume=True)
    with pytest.raises(OutputError, match="exists"):
        convert(open_model(checkpoint), out, dataclasses.replace(recipe, k=2), resume=True)


def test_what_was_to_come_after_the_file_still_comes(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed behind the last tensor, a command has a Modelfile and a model card to write."""
    out, card, modelfile = tmp_path / "out.gguf", tmp_path / "card.md", tmp_path / "out.Modelfile"
    quantize = ["--recipe", "stock", "--no-calibration", "--target-bpw", "6"]
    command = ["convert", str(checkpoint), str(out), *quantize, "--ollama", "m", "--model-card", str(card)]
    assert main(command) == 0
    before = [written(path) for path in (out, card, modelfile)]
    for missing in ([modelfile, card], [card], []):
        for path in missing:
            path.unlink()
        capsys.readouterr()
        assert main([*command, "--resume"]) == 0
        assert "complete already" in capsys.readouterr().out
        assert [path.read_bytes() for path in (out, card, modelfile)] == [b for _, b in before]
    assert written(out) == before[0]
    card.write_text("a card that someone has written")
    assert main([*command, "--resume"]) == 2
    assert "card.md: exists" in capsys.readouterr().err
    assert card.read_text() == "a card that someone has written"


@pytest.mark.parametrize("content", [b"", b"a text", b"GGUF"])
def test_what_is_no_model_of_ours_is_refused_at_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    out = tmp_path / "out.gguf"
    out.write_bytes(content)
    # a model that cannot be opened: it is not come to
    assert main(["convert", str(tmp_path / "missing"), str(out), "--resume"]) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    convert(open_model(checkpoint), out, RECIPES["value split"], force=True)
    assert main(["convert", str(tmp_path / "missing"), str(out), "--resume"]) == 2
    assert "exists; pass --force" in capsys.readouterr().err
