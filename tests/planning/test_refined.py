"""Plans of the refined layouts: orders, files on disk, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from numpy.typing import NDArray

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.planning import make_plan, plan_refined
from gguf_splitquant.planning.allocate import Piece
from gguf_splitquant.planning.curves import Salience, weight_curves
from gguf_splitquant.planning.refined import channel_orders, read_plan, read_plan_recipe
from gguf_splitquant.recipe import Recipe
from gguf_splitquant.refining.metric import Feedback
from tests.sample_models import small_model

SPLIT = Recipe(layout="split", target_bpw=5.0)


@dataclass(frozen=True)
class Statistics:
    """One input for every weight."""

    moments: NDArray[np.float64]
    sensitivity: Mapping[str, float] = field(default_factory=dict)

    def input_of(self, weight: str) -> str | None:
        return "x"

    def matrix(self, weight: str, expert: int | None = None) -> NDArray[np.float64]:
        return self.moments

    def salience(self, weight: str) -> Salience:
        return Feedback.of(self.moments).salience

    def experts(self, weight: str) -> None:
        return None


def statistics(columns: int = 256, **options: Mapping[str, float]) -> Statistics:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((600, columns)) * np.exp(1.5 * rng.standard_normal(columns))
    return Statistics(x.T @ x / len(x), **options)


def test_orders_hold_salient_clusters_first_each_in_the_inputs_order() -> None:
    known = statistics()
    pieces = {
        "a.weight": (Piece(Q.Q8_0, 32), Piece(Q.Q4_0, 224)),
        "b.weight": (Piece(Q.Q8_0, 64), Piece(Q.Q4_0, 192)),
        "c.weight": (Piece(Q.Q4_0, 256),),
    }
    orders = channel_orders(pieces, known)
    assert orders["a.weight"] is orders["b.weight"] and "c.weight" not in orders
    order = orders["a.weight"]
    assert order.name == "a.order"
    salience = np.diag(known.moments)
    for start, stop in ((0, 32), (32, 64), (64, 256)):
        cell = order.channels[start:stop]
        assert (np.diff(cell) > 0).all()
        assert stop == 256 or salience[cell].min() >= salience[order.channels[stop:]].max()


def test_more_clusters_than_an_order_can_hold_are_refused() -> None:
    pieces = {"a.weight": (Piece(Q.IQ4_NL, 32), Piece(Q.Q4_0, 32)) * 129}
    with pytest.raises(RecipeError, match=r"a\.weight: .* are cut into 258 clusters"):
        channel_orders(pieces, None)


def test_a_plan_survives_the_disk(tmp_path: Path) -> None:
    model, known = small_model(), statistics()
    plan = plan_refined(model, SPLIT, known)
    plan.write(tmp_path / "plan.json", SPLIT)
    again = read_plan(tmp_path / "plan.json", model, SPLIT, known)
    assert read_plan_recipe(tmp_path / "plan.json") == SPLIT
    assert again.pieces == plan.pieces
    assert {n: o.channels.tolist() for n, o in again.orders.items()} == {
        n: o.channels.tolist() for n, o in plan.orders.items()
    }


def test_the_file_has_clusters_and_one_order_per_input() -> None:
    model = small_model()
    pieces = (Piece(Q.Q8_0, 64), Piece(Q.Q4_0, 192))
    names = [t.name for t in model.tensors if t.name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")]
    refined = plan_refined(model, SPLIT, statistics())
    both = {**refined.pieces, **dict.fromkeys(names, pieces)}
    one_input = type(refined)(both, channel_orders({n: both[n] for n in names}, statistics()))
    plan = make_plan(model, SPLIT, one_input)
    shapes = {o.name: (o.qtype.name, o.shape) for o in plan.outputs}
    assert shapes["blk.0.attn_q.weight"] == ("Q8_0", (64, 64))
    assert shapes["blk.0.attn_q.split1.weight"] == ("Q4_0", (64, 192))
    assert [n for n in shapes if n.endswith(".order")] == ["blk.0.attn_q.order"]
    assert shapes["blk.0.attn_q.order"] == ("I8", (128,))


def test_unmeasured_weights_count_like_the_typical_measured_one() -> None:
    tensors = [t for t in small_model().tensors if t.name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")]
    half = statistics(sensitivity={"blk.0.attn_q.weight": 3.0})
    query, up = weight_curves(tensors, half)
    assert query.loss[-1] / query.n_params == pytest.approx(up.loss[-1] / up.n_params)
    no_measure = weight_curves(tensors, statistics())
    assert no_measure[0].loss[-1] == pytest.approx(no_measure[0].n_params)


def test_prediction_needs_measured_sensitivities() -> None:
    model = small_model()
    assert plan_refined(model, SPLIT, statistics()).predicted_kld is None
    names = [t.name for t in model.tensors]
    measured = plan_refined(model, SPLIT, statistics(sensitivity=dict.fromkeys(names, 1.0)))
    assert measured.predicted_kld is not None and measured.predicted_kld > 0


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.clear(), "not a plan"),
        (lambda d: d.update(format=9), "not a plan"),
        (lambda d: d.update(weights=[1]), "not a plan"),
        (lambda d: d["weights"].pop("blk.0.attn_q.weight"), "missing in the plan"),
        (lambda d: d["weights"].update({"blk.7.attn_q.weight": [["Q8_0", 256]]}), "missing in the model"),
        (lambda d: d["weights"].update({"blk.0.attn_q.weight": [["Q8_0", 128]]}), "are not 256 channels"),
        (
            lambda d: d["weights"].update({"blk.0.attn_q.weight": [["Q8_0", -64], ["Q8_0", 320]]}),
            "are not 256",
        ),
        (
            lambda d: d["weights"].update({"blk.0.attn_q.weight": [["Q4_K", 64], ["Q8_0", 192]]}),
            "whole blocks",
        ),
        (lambda d: d["weights"].update({"blk.0.attn_q.weight": [["Q9", 256]]}), "not a plan"),
        (lambda d: d["weights"].update({"blk.0.attn_q.weight": [["F64", 256]]}), "F64 is not one of"),
    ],
)
def test_foreign_and_damaged_plans_are_refused(tmp_path: Path, damage: object, words: str) -> None:
    model, path = small_model(), tmp_path / "plan.json"
    plan_refined(model, SPLIT, statistics()).write(path, SPLIT)
    document = json.loads(path.read_text())
    damage(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=words) as caught:
        read_plan(path, model, SPLIT, statistics())
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda d: d.pop("recipe"), "not a plan"),
        (lambda d: d.update(recipe=[1]), "its recipe: recipe: has fields"),
        (lambda d: d["recipe"].update(new=1), "its recipe: recipe: has fields .* use a newer version"),
        (lambda d: d["recipe"].update(target_bpw=None), "its recipe: target: give exactly one"),
        (lambda d: d["recipe"].update(layout="value", target_bpw=None), "leaves no types to a plan"),
        (lambda d: d["recipe"].update(layout="stock", target_bpw=None, qtype="Q8_0"), "leaves no types"),
    ],
)
def test_a_plan_without_a_recipe_of_its_own_is_refused(tmp_path: Path, damage: object, words: str) -> None:
    path = tmp_path / "plan.json"
    plan_refined(small_model(), SPLIT, statistics()).write(path, SPLIT)
    document = json.loads(path.read_text())
    damage(document)  # type: ignore[operator]
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match=words) as caught:
        read_plan_recipe(path)
    assert str(path) in str(caught.value)


def test_only_what_did_not_fit_has_a_note() -> None:
    recipe = Recipe(layout="stock", target_bpw=8.0, tensor_types=(("attn_q", "Q6_K"),))
    for columns, edited, note in ((96, None, "Q8_0 instead"), (256, Q.Q4_0, "")):
        model = small_model(columns)
        refined = plan_refined(model, recipe, statistics(columns))
        if edited:
            pieces = {**refined.pieces, "blk.0.attn_q.weight": (Piece(edited, columns),)}
            refined = dataclasses.replace(refined, pieces=pieces)
        (query,) = (t for t in make_plan(model, recipe, refined).tensors if "attn_q.weight" in t.source.name)
        assert query.note.endswith(note) and bool(query.note) == bool(note)


def test_clusters_do_not_fit_the_stock_layout(tmp_path: Path) -> None:
    model, path = small_model(), tmp_path / "plan.json"
    document = {"format": 1, "weights": {}}
    for tensor in plan_refined(model, SPLIT, statistics()).pieces:
        document["weights"][tensor] = [["Q8_0", 64], ["Q4_0", 192]]  # type: ignore[index]
    path.write_text(json.dumps(document))
    with pytest.raises(RecipeError, match="choose the split layout"):
        read_plan(path, model, Recipe(layout="stock", target_bpw=5.0), statistics())
