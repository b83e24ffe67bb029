"""The allocation against exhaustive search, and its promises about the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from hypothesis import given
from hypothesis import strategies as st

from gguf_splitquant.errors import RecipeError
from gguf_splitquant.planning import allocate as module
from gguf_splitquant.planning.allocate import Piece, allocate
from gguf_splitquant.planning.curves import WeightCurve
from gguf_splitquant.planning.orders import stored_bits
from gguf_splitquant.planning.rates import RATES


def curve(name: str, columns: int, rows: int = 64, seed: int = 0, source: str = "") -> WeightCurve:
    density = np.sort(np.random.default_rng(seed).lognormal(sigma=2, size=columns))[::-1]
    loss = np.concatenate([[0.0], np.cumsum(density)])
    return WeightCurve(name, rows, source, np.arange(columns), loss)


def exhaustive(weight: WeightCurve, budget: float, clusters: int) -> float:
    """Least loss of all cuts and types within the budget, as the definition says."""
    cuts = range(32, weight.columns, 32)
    best = np.inf
    for count in range(clusters):
        for chosen in itertools.combinations(cuts, count):
            edges = [0, *chosen, weight.columns]
            widths = np.diff(edges)
            options = [[r for r in RATES if width % r.block == 0] for width in widths]
            for rates in itertools.product(*options):
                bits = sum(r.bits * weight.rows * w for r, w in zip(rates, widths, strict=True))
                bits += 4 * weight.columns if count else 0
                parts = zip(rates, edges[:-1], edges[1:], strict=True)
                loss = sum(r.loss * (weight.loss[b] - weight.loss[a]) for r, a, b in parts)
                if bits <= budget:
                    best = min(best, loss)
    return best


@pytest.mark.parametrize("clusters", [1, 2, 3])
@pytest.mark.parametrize("bpw", [4.6, 5.2, 6.1])
def test_one_weight_gets_a_point_of_the_exhaustive_frontier(
    bpw: float, clusters: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLUSTER_PRICE", 0)
    weight = curve("w", 128, rows=4096)
    (choice,) = allocate([weight], bpw * weight.n_params, clusters).values()
    assert choice.bits <= bpw * weight.n_params
    # nothing of the same size loses less
    order = 4 * weight.columns if len(choice.pieces) > 1 else 0
    assert choice.loss == pytest.approx(exhaustive(weight, choice.bits + order, clusters), rel=1e-9)


@given(bpw=st.floats(4.5, 8.4), clusters=st.integers(1, 4), readers=st.integers(1, 6))
def test_budget_is_met_from_below_and_channels_are_partitioned(
    bpw: float, clusters: int, readers: int
) -> None:
    curves = [curve(f"w{i}", 512, seed=i, source=f"x{i // readers}") for i in range(60)]
    budget = bpw * sum(c.n_params for c in curves)
    choices = allocate(curves, budget, clusters)
    split = {c.source for c in curves if len(choices[c.name].pieces) > 1}
    bits = sum(c.bits for c in choices.values()) + stored_bits(readers * (clusters - 1)) * 512 * len(split)
    assert 0.98 * budget <= bits <= budget
    for choice in choices.values():
        assert sum(p.width for p in choice.pieces) == 512
        assert 1 <= len(choice.pieces) <= clusters
        assert all(a.qtype is not b.qtype for a, b in itertools.pairwise(choice.pieces))
        stored = sum(p.width * 64 * next(r.bits for r in RATES if r.qtype is p.qtype) for p in choice.pieces)
        assert choice.bits == pytest.approx(stored)


def test_salient_channels_and_sensitive_weights_get_more_bits() -> None:
    calm, loud = curve("calm", 512, rows=2048), curve("loud", 512, rows=2048)
    loud = WeightCurve("loud", loud.rows, "", loud.order, 16 * loud.loss)
    choices = allocate([calm, loud], 5.0 * 2 * calm.n_params, 3)
    assert choices["loud"].bits > choices["calm"].bits
    bits = {r.qtype: r.bits for r in RATES}
    for choice in choices.values():
        levels = [bits[p.qtype] for p in choice.pieces]
        assert len(levels) > 1 and levels == sorted(levels, reverse=True)


def test_more_clusters_lose_less() -> None:
    curves = [curve(f"w{i}", 512, rows=4096, seed=i) for i in range(6)]
    budget = 4.6 * sum(c.n_params for c in curves)
    losses = [sum(c.loss for c in allocate(curves, budget, k).values()) for k in (1, 2, 3)]
    assert losses[0] > 1.2 * losses[1] and losses[1] >= losses[2]


def test_fixed_types_stay() -> None:
    curves = [curve("a", 256), curve("b", 256)]
    choices = allocate(curves, 6.5 * 2 * 256 * 64, 3, {"a": Q.Q8_0})
    assert choices["a"].pieces == (Piece(Q.Q8_0, 256),)


def test_too_little_says_how_much_it_takes() -> None:
    with pytest.raises(RecipeError, match=r"2\.000 bits per weight.*smallest types need 2\.625"):
        allocate([curve("w", 256)], 2.0 * 256 * 64, 1)
