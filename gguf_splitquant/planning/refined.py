"""The plan for layers that are refined: types and channel clusters under the recipe's budget, and the orders.

A plan can be written as JSON, edited, and used again: it names types and widths, and the statistics say which
channels are the salient ones. The recipe that it was made from is with it, for the file that is made from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from ..bounded import parse_json, read_bytes
from ..errors import RecipeError
from ..progress import SILENT, Progress
from ..recipe import STOCK_TYPES, Recipe
from ..replacing import write_text
from ..sources.model import SourceModel, SourceTensor
from .allocate import Piece, allocate
from .curves import InputStatistics, WeightCurve, diagonal_of, weight_curves
from .orders import MOST_CLUSTERS, ChannelOrder
from .rates import narrow_type
from .roles import Role, role_of

_FORMAT = 1
_FIX = "give a file that --plan wrote"


@dataclass(frozen=True)
class RefinedPlan:
    """What becomes of the linear layers.

    Attributes:
        pieces: by weight, most salient channels first; one piece is an ordinary tensor.
        orders: by weight, of those with several pieces.
        predicted_kld: nats per token; None where sensitivities were not measured.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    orders: Mapping[str, ChannelOrder]
    predicted_kld: float | None = None

    def write(self, path: Path, recipe: Recipe) -> None:
        """Write as JSON. Raises OutputError."""
        write_text(path, self.text(recipe))

    def text(self, recipe: Recipe) -> str:
        """What :meth:`write` writes."""
        return json.dumps(self.to_json(recipe), indent=1) + "\n"

    def to_json(self, recipe: Recipe) -> dict[str, Any]:
        """As JSON: what :func:`plan_of` takes."""
        return {
            "format": _FORMAT,
            "recipe": json.loads(recipe.to_json()),
            "predicted_kld": self.predicted_kld,
            "weights": {n: [[p.qtype.name, p.width] for p in pieces] for n, pieces in self.pieces.items()},
        }


def refinable_tensors(model: SourceModel, recipe: Recipe) -> list[SourceTensor]:
    """The weights that a refined layout quantizes: linear, with rows of whole blocks of 32."""
    roles = (Role.LINEAR, Role.HEAD) if recipe.split_head else (Role.LINEAR,)
    return [t for t in model.tensors if role_of(t) in roles and t.shape[-1] % 32 == 0]


def plan_refined(
    model: SourceModel,
    recipe: Recipe,
    statistics: InputStatistics | None,
    budget: float | None = None,
    curves: Sequence[WeightCurve] | None = None,
    progress: Progress = SILENT,
) -> RefinedPlan:
    """Choose types and clusters.

    Args:
        model: the source; its linear weights are read once, unless their curves are given.
        recipe: of a refined layout without one type for all.
        statistics: of layer inputs; None: all channels alike.
        budget: bits for all linear layers; None: the recipe's bits per weight.
        curves: of :func:`refinable_tensors`.
        progress: counts weights.

    Raises:
        RecipeError: the target is below the smallest possible size.
    """
    tensors = refinable_tensors(model, recipe)
    curves = weight_curves(tensors, statistics, progress) if curves is None else curves
    if budget is None:
        assert recipe.target_bpw is not None
        budget = recipe.target_bpw * sum(c.n_params for c in curves)
    fixed = {t.name: q for t in tensors if (q := _fixed_type(t, recipe))}
    most = recipe.k if recipe.layout == "split" else 1
    choices = allocate(curves, budget, most, fixed, recipe.avoid)
    pieces = {name: choice.pieces for name, choice in choices.items()}
    measured = statistics is not None and all(c.name in statistics.sensitivity for c in curves)
    predicted = sum(c.loss for c in choices.values()) if measured else None
    return RefinedPlan(pieces, channel_orders(pieces, statistics), predicted)


def one_type(model: SourceModel, recipe: Recipe) -> RefinedPlan:
    """The plan of a recipe that names the type: nothing to choose."""
    types = {t.name: (_fixed_type(t, recipe), t.shape[-1]) for t in refinable_tensors(model, recipe)}
    return RefinedPlan({name: (Piece(q, columns),) for name, (q, columns) in types.items() if q}, {})


def _fixed_type(tensor: SourceTensor, recipe: Recipe) -> GGMLQuantizationType | None:
    wanted = recipe.fixed_type(tensor.name)
    return narrow_type(GGMLQuantizationType[wanted], tensor.shape[-1], recipe.avoid) if wanted else None


def read_plan(
    path: Path, model: SourceModel, recipe: Recipe, statistics: InputStatistics | None
) -> RefinedPlan:
    """Read what :meth:`RefinedPlan.write` wrote, for the same model.

    Raises:
        RecipeError: not such a file, or it does not fit the model or the layout.
    """
    document = _read_document(path)
    # whoever edits a plan does not predict anew
    return dataclasses.replace(plan_of(document, path, model, recipe, statistics), predicted_kld=None)


def read_plan_recipe(path: Path) -> Recipe:
    """The recipe from which a plan was made that :meth:`RefinedPlan.write` wrote.

    Raises:
        RecipeError: not such a file, or its recipe is not one of this version that leaves types to a plan.
    """
    try:
        fields = _read_document(path)["recipe"]
    except (LookupError, TypeError) as error:
        raise RecipeError(path, f"not a plan: {error!r}", _FIX) from error
    try:
        recipe = Recipe.from_json(json.dumps(fields))
    except RecipeError as error:
        raise RecipeError(path, f"its recipe: {error.subject}: {error.cause}", error.fix) from error
    if not recipe.refined or recipe.qtype:
        raise RecipeError(path, "its recipe leaves no types to a plan", _FIX)
    return recipe


def _read_document(path: Path) -> Any:
    try:
        return parse_json(read_bytes(path))
    except (OSError, ValueError) as error:
        raise RecipeError(path, f"not a plan: {error!r}", _FIX) from error


def plan_of(
    document: Any, path: Path, model: SourceModel, recipe: Recipe, statistics: InputStatistics | None
) -> RefinedPlan:
    """What :meth:`RefinedPlan.to_json` made, for the same model; ``path`` is where it was found.

    Raises:
        RecipeError: not such a document, or it does not fit the model or the layout.
    """
    try:
        if document["format"] != _FORMAT:
            raise ValueError(f"format {document['format']!r}")
        predicted = document.get("predicted_kld")
        predicted = None if predicted is None else float(predicted)
        weights = {
            str(name): tuple(Piece(GGMLQuantizationType[str(q)], _whole(width)) for q, width in pieces)
            for name, pieces in document["weights"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise RecipeError(path, f"not a plan: {error!r}", _FIX) from error
    tensors = {t.name: t for t in refinable_tensors(model, recipe)}
    if weights.keys() != tensors.keys():
        name = sorted(weights.keys() ^ tensors.keys())[0]
        where = "the model" if name in weights else "the plan"
        raise RecipeError(path, f"{name} is missing in {where}", "use the plan of this model and recipe")
    for name, pieces in weights.items():
        _check_pieces(path, name, pieces, tensors[name].shape[-1], recipe)
    in_order = {name: weights[name] for name in tensors}
    return RefinedPlan(in_order, channel_orders(in_order, statistics), predicted)


def _whole(width: Any) -> int:
    if type(width) is not int:
        raise TypeError(f"the width {width!r} is no integer")
    return width


def _check_pieces(path: Path, name: str, pieces: tuple[Piece, ...], columns: int, recipe: Recipe) -> None:
    if sum(p.width for p in pieces) != columns or any(p.width <= 0 for p in pieces):
        raise RecipeError(path, f"the widths of {name} are not {columns} channels")
    if len(pieces) > 1 and recipe.layout != "split":
        raise RecipeError(path, f"{name} has clusters", "choose the split layout")
    for piece in pieces:
        if piece.qtype.name not in STOCK_TYPES:
            raise RecipeError(path, f"{name}: {piece.qtype.name} is not one of {', '.join(STOCK_TYPES)}")
        if piece.width % GGML_QUANT_SIZES[piece.qtype][0]:
            raise RecipeError(
                path, f"{name}: {piece.width} channels are not whole blocks of {piece.qtype.name}"
            )


def channel_orders(
    pieces: Mapping[str, Sequence[Piece]], statistics: InputStatistics | None
) -> dict[str, ChannelOrder]:
    """Orders for the weights in several pieces: salient clusters first, each in the input's own order.

    Inside a cluster the input's order is kept: neighbouring channels (those of one attention head) are
    correlated, and error feedback inside a block gains from that.

    Raises:
        RecipeError: more clusters than an order can tell apart.
    """
    readers: dict[str, list[str]] = {}
    for name, parts in pieces.items():
        if len(parts) > 1:
            source = (statistics.input_of(name) if statistics else None) or name
            readers.setdefault(source, []).append(name)
    orders: dict[str, ChannelOrder] = {}
    for names in readers.values():
        width = sum(p.width for p in pieces[names[0]])
        salience = np.zeros(width)
        if statistics is not None and statistics.input_of(names[0]) is not None:
            salience = diagonal_of(statistics.matrix(names[0])).astype(np.float64)
        cuts = sorted({int(c) for name in names for c in np.cumsum([p.width for p in pieces[name]])})
        if len(cuts) > MOST_CLUSTERS:
            cause = f"and what reads its input with it are cut into {len(cuts)} clusters"
            raise RecipeError(names[0], cause, f"use a plan with at most {MOST_CLUSTERS}")
        clusters = np.empty(width, np.uint8)
        clusters[np.argsort(-salience, kind="stable")] = np.searchsorted(cuts, np.arange(width), side="right")
        order = ChannelOrder(names[0].removesuffix(".weight") + ".order", clusters)
        orders.update(dict.fromkeys(names, order))
    return orders
