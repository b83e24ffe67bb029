"""Bits where they matter: the types and channel clusters that lose least under a budget.

Losses of weights add up (see :mod:`.curves`), so this is the classic rate-distortion allocation: for a price
per bit every weight chooses for itself, and the price is found by bisection. A weight's choice is exact: its
input channels, most salient first, are cut into at most k clusters by dynamic programming over all cuts, and
every cluster takes the best type. The number of clusters per layer comes out of this; nobody sets it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ..errors import RecipeError
from .curves import WeightCurve
from .orders import stored_bits
from .rates import RATES, Rate

F64 = NDArray[np.float64]

CLUSTER_PRICE = 8 * 1024
"""Bits that a further cluster must be worth: one more matrix product per token is not free. Four times as
much costs a model of small matrices (stories15M) a tenth of KLD; a quarter of it gains little more (each
measured once, by hand)."""

_CUTS = 64
"""Most places for a cut that are looked at per weight."""


@dataclass(frozen=True)
class Piece:
    """Consecutive channels of one type.

    Attributes:
        qtype: the type.
        width: channels.
    """

    qtype: GGMLQuantizationType
    width: int


@dataclass(frozen=True)
class Choice:
    """What one weight becomes.

    Attributes:
        pieces: most salient channels first.
        bits: stored bits.
        loss: predicted divergence.
    """

    pieces: tuple[Piece, ...]
    bits: float
    loss: float


def allocate(
    curves: Sequence[WeightCurve],
    budget: float,
    most_clusters: int,
    fixed: Mapping[str, GGMLQuantizationType] | None = None,
    avoid: Collection[str] = (),
) -> dict[str, Choice]:
    """Choose for all weights.

    Args:
        curves: of the weights; rows of whole blocks of 32.
        budget: bits for all of them together.
        most_clusters: 1 for one type per weight.
        fixed: weights whose type is not open.
        avoid: names of types that are not chosen.

    Returns:
        Choices by weight, together within the budget.

    Raises:
        RecipeError: the budget is below what the smallest types need.
    """
    fixed = fixed or {}
    readers = Counter(c.input for c in curves)
    orders = {c.input: c.columns * stored_bits(readers[c.input] * (most_clusters - 1)) for c in curves}
    solvers = [
        _Solver(c, most_clusters, fixed.get(c.name), orders[c.input] / readers[c.input], avoid)
        for c in curves
    ]
    n_params = sum(c.n_params for c in curves)
    least = [s.solve(np.inf) for s in solvers]
    if _bits(curves, least, orders) > budget:
        raise RecipeError(
            "target",
            f"{budget / max(1, n_params):.3f} bits per weight for the linear layers",
            f"the smallest types need {_bits(curves, least, orders) / max(1, n_params):.3f}: ask for more",
        )
    scale = sum(float(c.loss[-1]) for c in curves) / max(1, n_params) or 1.0
    low, high = 1e-12 * scale, 1e3 * scale  # prices that buy everything, and next to nothing
    chosen = least
    for _ in range(48):
        price = float(np.sqrt(low * high))
        attempt = [s.solve(price) for s in solvers]
        if _bits(curves, attempt, orders) <= budget:
            chosen, high = attempt, price
        else:
            low = price
    chosen = _spend(curves, solvers, chosen, high, budget, orders)
    return {c.name: choice for c, choice in zip(curves, chosen, strict=True)}


def _spend(
    curves: Sequence[WeightCurve],
    solvers: Sequence[_Solver],
    chosen: list[Choice],
    price: float,
    budget: float,
    orders: Mapping[str, int],
) -> list[Choice]:
    """Use what the bisection left: the better choices at lower prices that still fit, best bargain first."""
    chosen = list(chosen)
    left = budget - _bits(curves, chosen, orders)
    for factor in (0.7, 0.4, 0.2, 0.05, 0.01):
        offers = []
        for i, solver in enumerate(solvers):
            offer = solver.solve(price * factor)
            more, gain = offer.bits - chosen[i].bits, chosen[i].loss - offer.loss
            if more > 0 and gain > 0:
                offers.append((gain / more, i, offer))
        for _, i, offer in sorted(offers, key=lambda o: (-o[0], o[1])):
            if offer.bits - chosen[i].bits <= left:
                attempt = [*chosen[:i], offer, *chosen[i + 1 :]]
                bits = _bits(curves, attempt, orders)  # a first split brings the channel order with it
                if bits <= budget:
                    chosen, left = attempt, budget - bits
    return chosen


def _bits(curves: Sequence[WeightCurve], choices: Sequence[Choice], orders: Mapping[str, int]) -> float:
    """Stored bits of all weights, and of the channel orders of inputs that any of them splits.

    ``orders``: bits of an order, by input.
    """
    cut = {curve.input for curve, choice in zip(curves, choices, strict=True) if len(choice.pieces) > 1}
    return sum(c.bits for c in choices) + sum(orders[name] for name in cut)


class _Solver:
    """One weight's best choice for a price per bit."""

    def __init__(
        self,
        curve: WeightCurve,
        most_clusters: int,
        fixed: GGMLQuantizationType | None,
        order_bits: float,
        avoid: Collection[str],
    ) -> None:
        """``order_bits``: this weight's part of its input's channel order."""
        self._order_bits = order_bits
        rates = [r for r in RATES if r.block <= curve.columns and r.qtype.name not in avoid]
        if fixed is not None:
            rates = [r for r in RATES if r.qtype is fixed] or [_unrated(fixed)]
            most_clusters = 1
        self._most = most_clusters
        if most_clusters == 1:
            rates = [r for r in rates if curve.columns % r.block == 0]
            cuts = np.array([0, curve.columns])
        else:
            step = 32
            while curve.columns // step > _CUTS and curve.columns % (2 * step) == 0:
                step *= 2
            cuts = np.arange(0, curve.columns + 1, step)
        self._cuts, self._rates = cuts, rates
        widths = cuts[None, :] - cuts[:, None]
        loss = np.maximum(curve.loss[cuts][None, :] - curve.loss[cuts][:, None], 0)
        fits = np.stack([(widths > 0) & (widths % r.block == 0) for r in rates])
        self._loss = np.where(fits, np.array([r.loss for r in rates])[:, None, None] * loss, np.inf)
        bits = np.array([r.bits * curve.rows for r in rates])[:, None, None] * widths
        self._bits = np.where(fits, bits, np.inf)

    def solve(self, price: float) -> Choice:
        """The choice with the least ``loss + price * bits``; for an infinite price the fewest bits."""
        cost = self._bits if np.isinf(price) else self._loss + price * self._bits
        bit = 1.0 if np.isinf(price) else price
        kind = cost.argmin(axis=0)
        segment = np.take_along_axis(cost, kind[None], axis=0)[0]
        best = segment[0].copy()  # best[j]: channels up to cut j in one cluster
        layers = [best]
        starts: list[NDArray[np.int64]] = []
        for i in range(1, self._most):
            overhead = CLUSTER_PRICE + (self._order_bits if i == 1 else 0.0)
            through = layers[-1][:, None] + segment + bit * overhead
            starts.append(through.argmin(axis=0))
            layers.append(through.min(axis=0))
        count = int(np.argmin([layer[-1] for layer in layers]))
        ends = [len(self._cuts) - 1]
        for layer in range(count, 0, -1):
            ends.append(int(starts[layer - 1][ends[-1]]))
        edges = [0, *reversed(ends)]
        pairs = list(pairwise(edges))
        return self._choice(pairs, [int(kind[a, b]) for a, b in pairs])

    def _choice(self, pairs: Sequence[tuple[int, int]], kinds: Sequence[int]) -> Choice:
        pieces: list[Piece] = []
        for (a, b), kind in zip(pairs, kinds, strict=True):
            width, qtype = int(self._cuts[b] - self._cuts[a]), self._rates[kind].qtype
            if pieces and pieces[-1].qtype is qtype:
                pieces[-1] = Piece(qtype, pieces[-1].width + width)
            else:
                pieces.append(Piece(qtype, width))
        at = [(k, a, b) for (a, b), k in zip(pairs, kinds, strict=True)]
        return Choice(
            tuple(pieces),
            float(sum(self._bits[i] for i in at)),
            float(sum(self._loss[i] for i in at)),
        )


def _unrated(qtype: GGMLQuantizationType) -> Rate:
    """A type that only a user chooses: its loss does not matter, its bits do."""
    block, size = GGML_QUANT_SIZES[qtype]
    return Rate(qtype, 8 * size / block, block, 0.0)
