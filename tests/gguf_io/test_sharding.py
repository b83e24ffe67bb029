"""Any number of files, each made on its own: the same bytes as all of them made together."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.errors import OutputError, RecipeError, SplitQuantError
from gguf_splitquant.evaluation.contents import read_contents
from gguf_splitquant.evaluation.results import recorded_errors
from gguf_splitquant.file_plan import plan_file
from gguf_splitquant.gguf_io.sharding import Shards, one_of, shard_groups
from gguf_splitquant.planning.plan import OutputTensor
from gguf_splitquant.recipe import RECIPES, Recipe
from tests.planning.test_refined import statistics
from tests.sample_models import small_model

SPLIT = Recipe(layout="split", target_bpw=5.0, embedding="Q8_0")


def weights(sizes: list[int]) -> list[tuple[OutputTensor, ...]]:
    return [(OutputTensor(f"t{i}", GGMLQuantizationType.F32, (n, 8)),) for i, n in enumerate(sizes)]


@given(
    sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=30),
    data=st.data(),
    header=st.integers(0, 10**5),
)
def test_as_many_files_as_asked_for_in_order_and_even(
    sizes: list[int], data: st.DataObject, header: int
) -> None:
    count = data.draw(st.integers(1, len(sizes)))
    groups = shard_groups(weights(sizes), header, Shards(count=count))
    assert len(groups) == count and all(groups)
    assert [o for group in groups for o in group] == [o for (o,) in weights(sizes)]
    largest = max(sum(o.nbytes for o in group) for group in groups)
    total = 32 * sum(sizes) + header
    # no file is larger than an even share and the largest tensor, with the entries in the header
    assert largest <= total / count + 32 * max(sizes) + 300 * len(sizes)


@pytest.mark.parametrize(
    ("recipe", "shards"),
    [
        (RECIPES["paper"], Shards(count=3)),
        (RECIPES["paper"], Shards(most_bytes=24_000)),  # sub-layers of one weight in two files
        (SPLIT, Shards(count=4)),
        (Recipe(layout="float"), Shards(count=2)),
    ],
)
def test_one_shard_alone_is_the_same_file(tmp_path: Path, recipe: Recipe, shards: Shards) -> None:
    model, known = small_model(), statistics() if recipe.refined else None
    (tmp_path / "alone").mkdir()
    together = convert(model, tmp_path / "out.gguf", recipe, statistics=known, shards=shards)
    count = len(together.paths)
    assert count > 1
    for number, path in reversed(list(enumerate(together.paths, 1))):
        only = Shards(shards.most_bytes, only=(number, count))
        alone = convert(model, tmp_path / "alone" / "out.gguf", recipe, statistics=known, shards=only)
        assert alone.paths == (tmp_path / "alone" / path.name,)
        assert alone.total_bytes == path.stat().st_size
        assert alone.path.read_bytes() == path.read_bytes()
        _, layout, _ = plan_file(model, recipe, statistics=known, shards=only)
        assert layout.total_bytes == alone.total_bytes and layout.whole_bytes == together.total_bytes
    merged = recorded_errors(read_contents(tmp_path / "alone" / together.path.name))
    assert merged == pytest.approx(together.relative_errors)


def test_a_weight_and_its_sub_layers_stay_together(tmp_path: Path) -> None:
    plan, layout, _ = plan_file(small_model(), RECIPES["paper"], shards=Shards(count=5))
    files = {o.name: number for number, outputs in enumerate(layout.outputs) for o in outputs}
    assert len(layout.files) == 5
    for tensor in plan.tensors:
        assert len({files[o.name] for o in tensor.outputs}) == 1


def test_a_single_file_is_what_it_was(tmp_path: Path) -> None:
    model = small_model()
    whole = convert(model, tmp_path / "whole.gguf", RECIPES["paper"])
    for i, shards in enumerate((Shards(count=1), Shards(only=(1, 1)), Shards(most_bytes=10**9))):
        other = convert(model, tmp_path / f"{i}.gguf", RECIPES["paper"], shards=shards)
        assert other.path.read_bytes() == whole.path.read_bytes()


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    assert one_of("2/4") == (2, 4) and Shards(only=(2, 4)) == Shards(count=4, only=(2, 4))
    for text in ("", "2", "2/", "a/4", "-1/4", "2/4/6", "1/999999"):
        with pytest.raises(RecipeError, match="write I/N"):
            one_of(text)
    for options in (
        {"only": (0, 4)},
        {"only": (5, 4)},
        {"count": 0},
        {"count": 70_000},
        {"most_bytes": 0},
        {"most_bytes": 9, "count": 2},
        {"count": 3, "only": (1, 4)},
    ):
        with pytest.raises(RecipeError):
            Shards(**options)  # type: ignore[arg-type]
    with pytest.raises(OutputError, match=r"100 files for 6 tensors"):
        convert(small_model(), tmp_path / "out.gguf", RECIPES["paper"], shards=Shards(count=100))
    with pytest.raises(OutputError, match=r"the division is into \d+ files, not 2; give"):
        convert(small_model(), tmp_path / "o.gguf", RECIPES["paper"], shards=Shards(24_000, only=(2, 2)))
    assert list(tmp_path.iterdir()) == []


def test_from_the_command_line(stories15m: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["convert", str(stories15m), str(tmp_path / "out.gguf"), "--recipe", "plain"]
    assert main([*command, "--shards", "2"]) == 0
    first, second = sorted(tmp_path.iterdir())
    expected = second.read_bytes()
    capsys.readouterr()
    assert main([*command, "--shard", "2/2"]) == 2
    assert f"{second}: exists; pass --force" in capsys.readouterr().err
    second.unlink()
    assert main([*command, "--shard", "2/2"]) == 0
    assert f"{second}: {len(expected):,} bytes, file 2 of 2" in capsys.readouterr().out
    assert second.read_bytes() == expected
    assert sorted(tmp_path.iterdir()) == [first, second]
    for wrong in (["--shard", "2"], ["--shard", "1/2", "--ollama", "m"], ["--shards", "2", "--ollama", "m"]):
        assert main([*command, "--force", *wrong]) == 2
    with pytest.raises(SplitQuantError, match="is one of 2 shards"):
        read_contents(second)
