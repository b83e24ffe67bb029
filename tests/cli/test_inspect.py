"""What ``inspect`` says about a file of ours and about any other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from gguf_splitquant.cli import main
from gguf_splitquant.convert import convert
from gguf_splitquant.planning.allocate import Piece
from gguf_splitquant.planning.refined import RefinedPlan, channel_orders, refinable_tensors
from gguf_splitquant.recipe import RECIPES, Recipe
from tests.evaluation.test_contents import write
from tests.sample_models import small_model

SPLIT = Recipe(layout="split", target_bpw=5.5)


def test_a_split_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "paper.gguf"
    model = small_model()
    report = convert(model, path, RECIPES["paper"])
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == model.n_params
    assert found["bytes"] == path.stat().st_size
    assert (found["layout"], found["recipe"]["k"]) == ("value", 3)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert set(tensors) == {tensor.name for tensor in model.tensors}
    split = tensors["blk.0.ffn_up.weight"]
    assert len(split["types"]) == 3 and split["shape"] == [96, 256]
    assert split["bpw"] == pytest.approx(8 * split["bytes"] / (96 * 256))
    assert split["relative_error"] == pytest.approx(report.relative_errors["blk.0.ffn_up.weight"], rel=1e-6)
    assert tensors["token_embd.weight"]["relative_error"] is None
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    (recipe,) = (line for line in table.splitlines() if line.startswith("recipe   "))
    assert {"bits 4", "granularity tensor", "k 3"} <= set(recipe[9:].split(", "))
    assert f"{path.stat().st_size:,} bytes" in table


def test_any_other_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "other.gguf", {"token_embd.weight": np.ones((4, 32), np.float32)})
    assert main(["inspect", str(path)]) == 0
    table = capsys.readouterr().out
    assert "layout" not in table and "types    1 F32" in table
    path.write_bytes(path.read_bytes()[:100])
    assert main(["inspect", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "other.gguf: ends inside its header" in error


def test_a_channel_split_shows_whole_weights_and_who_holds_which_channels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = small_model(), tmp_path / "split.gguf"
    pieces = {
        t.name: (Piece(GGMLQuantizationType.Q8_0, 64), Piece(GGMLQuantizationType.Q4_0, t.shape[-1] - 64))
        for t in refinable_tensors(model, SPLIT)
    }
    convert(model, path, SPLIT, refined=RefinedPlan(pieces, channel_orders(pieces, None)))
    assert main(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    assert set(tensors) == {tensor.name for tensor in model.tensors}
    assert tensors["blk.0.ffn_up.weight"]["shape"] == [96, 256]
    assert tensors["blk.0.ffn_up.weight"]["bpw"] == pytest.approx((64 * 8.5 + 192 * 4.5) / 256)
    orders = sum(4 * 256 for _ in pieces)
    weights = sum(5.5 * t.n_params for t in refinable_tensors(model, SPLIT))
    assert found["linear_bpw"] == pytest.approx((weights + orders) / (weights / 5.5))
    assert main(["inspect", str(path)]) == 0
    assert "64 Q8_0 + 192 Q4_0" in capsys.readouterr().out


def test_a_model_card_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, card = tmp_path / "plain.gguf", tmp_path / "card.md"
    convert(small_model(), path, RECIPES["plain"])
    assert main(["inspect", str(path), "--model-card", str(card)]) == 0
    assert "| plain.gguf |" in card.read_text()
    assert main(["inspect", str(path), "--model-card", str(card)]) == 2
    assert main(["inspect", str(path), "--results", str(card)]) == 2
    assert "exists; pass --force" in (said := capsys.readouterr().err) and "add --model-card" in said
    assert main(["inspect", str(path), "--model-card", str(card), "--force", "--results", str(path)]) == 2
    assert "not results of an evaluation" in capsys.readouterr().err
